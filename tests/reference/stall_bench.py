"""How long training waits for what runs beside it: checkpoints, a tracking server that is away, the ranks' agreement.

    python -m tests.reference.stall_bench --data DATASET [--to docs/benchmarks/stalls.md]

Runs of experiments/gtsrb_resnet18.yaml in one process, with times from their own records: epochs with
a checkpoint each EVERY steps against epochs without, in turns; steps with an MLflow server against steps while it is
killed, in turns within one run; and the bare time in which two ranks agree.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scalecv.testing.servers import MlflowServer
from scalecv.testing.train_process import TrainProcess, updates_of
from tests.reference.bench import ROOT, cpu

EVERY = 5
"""Steps between two checkpoints."""
AGREE = """
import sys, time, torch, torch.distributed as dist
from scalecv.train.requests import Requests
rank, ranks = int(sys.argv[1]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=ranks)
requests = Requests("/nowhere/STOP", 60, rank=rank, ranks=ranks)
for _ in range(100):
    requests.begin(); requests.end()
taken = []
for _ in range(2000):
    began = time.perf_counter()
    requests.begin(); requests.end()
    taken.append(time.perf_counter() - began)
if rank == 0:
    print(sorted(taken)[1000])
dist.barrier()
dist.destroy_process_group()
"""


def process(data: Path, folder: Path, name: str, epochs: int, **keys: object) -> TrainProcess:
    own = {"name": name, "data.uri": data, "train.epochs": epochs, "track.log_every": 1, "scale.workers": 0}
    own |= {"track.pictures": 0, "track.storage": folder / "runs", "track.uri": f"sqlite:///{folder}/{name}.db", **keys}
    arguments = [str(ROOT / "experiments/gtsrb_resnet18.yaml"), *(f"{key}={value}" for key, value in own.items())]
    return TrainProcess(arguments, {"RAY_ADDRESS": ""}, folder / name, (folder / "runs" / name, "*/spool.jsonl"))


def step_times(run: TrainProcess) -> dict[int, tuple[float, float]]:
    """Step -> (when it ended, seconds it took), within epochs only."""
    told = [(updates_of(event), event["time_ms"] / 1000) for event in run.events if updates_of(event)]
    ends = {event["step"] for event in run.events if event["kind"] == "metrics" and "train/loss" in event["metrics"]}
    pairs = itertools.pairwise(told)
    return {step: (at, at - before) for (last, before), (step, at) in pairs if step == last + 1 and last not in ends}


def checkpoints(data: Path, folder: Path, epochs: int, pairs: int) -> tuple[float, list[float]]:
    """Seconds of an epoch without checkpoints inside it, and by what share one with them is longer, by pair."""
    quiet_s, shares = [], []
    for pair in range(pairs):
        runs = {
            name: process(data, folder, f"{name}-{pair}", epochs, **keys)
            for name, keys in {
                "quiet": {"track.checkpoint_minutes": 1000},
                "saves": {"track.checkpoint_steps": EVERY},
            }.items()
        }
        for name in list(runs) if pair % 2 == 0 else reversed(runs):
            runs[name].start().wait()
        took = {name: statistics.median(epoch_times(run)[1:]) for name, run in runs.items()}
        quiet_s.append(took["quiet"])
        shares.append(took["saves"] / took["quiet"] - 1)
    return statistics.median(quiet_s), shares


def epoch_times(run: TrainProcess) -> list[float]:
    points = [event["metrics"] for event in run.events if event["kind"] == "metrics"]
    return [point["time/train_s"] for point in points if "time/train_s" in point]


def away(data: Path, folder: Path, epochs: int, phase_s: float) -> list[float]:
    """Ratios of the median step while the MLflow server is away to that of the neighbouring time with it."""
    server = MlflowServer(folder / "server")
    server.start()
    keys = {"track.uri": server.uri, "train.threads": 1, "data.decode_threads": 1}
    run = process(data, folder, "tracked", epochs, **keys).start()
    phases: list[tuple[bool, float, float]] = []
    try:
        run.until_step(10)
        while run.running.poll() is None:
            for is_there in (True, False):
                if not is_there:
                    server.kill()
                began = time.time()
                ends = time.monotonic() + phase_s
                while time.monotonic() < ends and run.running.poll() is None:
                    time.sleep(0.5)
                if run.running.poll() is None:
                    phases.append((is_there, began, time.time()))
            if run.running.poll() is None:
                server.start()
                time.sleep(5)
        run.wait()
    finally:
        run.stop()
        server.kill()
    ends = list(step_times(run).values())
    medians = [
        (is_there, statistics.median(took for at, took in ends if began < at <= end)) for is_there, began, end in phases
    ]
    pairs = zip(medians[::2], medians[1::2], strict=False)
    return [without / with_it for (_, with_it), (_, without) in pairs]


def agreement(folder: Path, ranks: int) -> float:
    """Seconds that ranks of one machine take to agree, without a step to hide it."""
    command = [sys.executable, "-c", AGREE]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder / f"meet-{ranks}"), str(ranks)], stdout=subprocess.PIPE, env=env
        )
        for rank in range(ranks)
    ]
    said = [one.communicate()[0] for one in started]
    return float(said[0])


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--data", type=Path, required=True)
    ask.add_argument("--epochs", type=int, default=8)
    ask.add_argument("--pairs", type=int, default=3)
    ask.add_argument("--away-epochs", type=int, default=20)
    ask.add_argument("--phase-s", type=float, default=30)
    ask.add_argument("--to", type=Path)
    args = ask.parse_args()
    with tempfile.TemporaryDirectory(prefix="scalecv-stalls-") as name:
        folder, data = Path(name), args.data.resolve()
        agree = agreement(folder, 2)
        epoch_s, shares = checkpoints(data, folder, args.epochs, args.pairs)
        ratios = away(data, folder, args.away_epochs, args.phase_s)
    print(json.dumps({"epoch_s": epoch_s, "longer_by": shares, "away_ratios": ratios, "agreement_s": agree}))
    if args.to:
        args.to.write_text(report(args, epoch_s, shares, ratios, agree))


def report(args: argparse.Namespace, epoch_s: float, shares: list[float], ratios: list[float], agree: float) -> str:
    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} pairs)"

    return f"""# What training waits for

{datetime.datetime.now(datetime.UTC).date()}, {cpu()}, no GPU. experiments/gtsrb_resnet18.yaml, one process.

```
python -m tests.reference.stall_bench --data DATASET --epochs {args.epochs} --pairs {args.pairs} \\
    --away-epochs {args.away_epochs} --phase-s {args.phase_s:g}
```

| what | figure | goal |
|---|---|---|
| an epoch without checkpoints inside it (median) | {epoch_s:.1f} s | |
| an epoch with a checkpoint each {EVERY} steps, longer by a share of | {spread(shares)} | at most 0.10 |
| a step while the MLflow server is away, against its neighbours with it | {spread(ratios)} | within 0.01 of 1 |
| two ranks agree on what was asked of the run, at each step beside the update | {agree * 1e6:.0f} µs | |
"""


if __name__ == "__main__":
    main()
