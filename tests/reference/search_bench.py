"""What a sweep decides, on simulated learning curves, and what it costs on Ray Tune.

    python -m tests.reference.search_bench --parts curves verdict overhead --sweeps 200 --to docs/benchmarks/search.md

curves    the same configurations searched at random (each trial to its end), by promotion with rungs in epochs and in
          device-seconds; the quality of the chosen trial, without its noise
verdict   sweeps whose configurations are all alike, and sweeps with one that is better: how often the race says so
overhead  1,000 trials that do nothing, with bare Ray Tune and with our layer (records, MLflow spool, decisions)
start     real trials, from the decision that one begins to its first step (--trials 12)
See `search_sim` for the curves.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scalecv.config.search import Search
from scalecv.search.schedule import best_of
from tests.reference.search_sim import World, alike, simulate, spread, told

BUDGET_S = 12_000
EPOCHS = 27
TRIALS = 400


def curves(sweeps: int) -> Iterator[str]:
    """Quality of the trial that a sweep chooses, where large networks learn as much in an epoch, and where more."""
    for gain, world in ((0.0, "learns as much in an epoch as a small one"), (0.7, "learns k^0.7 times as much")):
        yield f"### A network whose epochs take k times as long {world}"
        yield ""
        yield from _curves(sweeps, gain)
        yield ""


def _curves(sweeps: int, gain: float) -> Iterator[str]:
    about = {"trials": TRIALS, "finalists": 0}
    ways = {
        "random, each trial to its end": Search(scheduler="none", budget=f"{BUDGET_S}s", **about),
        "promotion, rungs in epochs": Search(budget=f"{BUDGET_S}s", rung="1epochs", **about),
        "promotion, rungs in device-seconds": Search(budget=f"{BUDGET_S}s", rung="30s", **about),
        "promotion in device-seconds, half the budget": Search(budget=f"{BUDGET_S // 2}s", rung="30s", **about),
        "promotion in epochs, half the budget": Search(budget=f"{BUDGET_S // 2}s", rung="1epochs", **about),
        "median, rungs in device-seconds": Search(budget=f"{BUDGET_S}s", rung="30s", scheduler="median", **about),
        "hyperband, rungs in device-seconds": Search(budget=f"{BUDGET_S}s", rung="30s", scheduler="hyperband", **about),
    }
    regrets: dict[str, list[float]] = {way: [] for way in ways}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    begun: dict[str, list[int]] = {way: [] for way in ways}
    for seed in range(sweeps):
        config = spread(seed, gain=gain)
        top = max(config(number).quality for number in range(TRIALS))
        for way, search in ways.items():
            plan, trials, _, _ = simulate(search, World(config, EPOCHS, 0.005, 0.007, seed))
            best = best_of(plan, trials)
            regrets[way].append(top - (config(best.number).quality if best else 0.0))
            spent[way].append(sum(one.device_s for one in trials) / BUDGET_S)
            begun[way].append(len(trials))
    yield (
        f"Regret: quality of the best of {TRIALS} configurations less that of the chosen one, in points (1/100); "
        f"{sweeps} sweeps, 2 workers, budget {BUDGET_S:,} device-seconds, {EPOCHS} epochs; an epoch takes 3 to 60 s by "
        "architecture. Interval: 95 %, of the paired difference to random."
    )
    yield ""
    yield "| search | regret, mean | median | difference to random | trials begun | device-seconds of the budget |"
    yield "|---|---|---|---|---|---|"
    random = np.array(regrets["random, each trial to its end"])
    for way, found in regrets.items():
        less = 100 * (np.array(found) - random)
        half = 1.96 * less.std(ddof=1) / np.sqrt(len(less))
        mean, median = 100 * np.mean(found), 100 * np.median(found)
        cells = [way, f"{mean:.2f}", f"{median:.2f}", f"{less.mean():+.2f} ± {half:.2f}", f"{np.mean(begun[way]):.0f}"]
        yield f"| {' | '.join(cells)} | {np.mean(spent[way]):.2f} (at most {max(spent[way]):.2f}) |"


def verdicts(sweeps: int) -> Iterator[str]:
    """How often the race tells something apart where nothing differs, and finds what does."""
    yield (
        f"{sweeps} sweeps each of 27 trials and a race of 3 finalists and the experiment as written over 3 to 5 seeds; "
        "noise: standard deviation between seeds, in points."
    )
    yield ""
    yield (
        "| noise | all alike: a winner declared | any pair told apart | seeds | one is 3 points better: among the "
        "finalists | declared the winner | seeds |"
    )
    yield "|---|---|---|---|---|---|---|"
    for noise in (0.005, 0.007, 0.010, 0.015):
        row = [f"{100 * noise:.1f}"]
        for planted in (0.0, 0.03):
            wins, apart, finals, seeds = 0, 0, 0, []
            for seed in range(sweeps):
                world = World(alike(planted=planted), 9, 0.004, noise, seed)
                plan, trials, race, _ = simulate(Search(trials=27), world)
                winner, is_apart, used = told(plan, trials, race)
                wins += winner == 3 if planted else winner is not None
                apart += is_apart
                finals += any(one.entrant == 3 for one in race)
                seeds.append(used)
            shares = [finals, wins] if planted else [wins, apart]
            row += [*(f"{100 * share / sweeps:.1f} %" for share in shares), f"{np.mean(seeds):.1f}"]
        yield f"| {' | '.join(row)} |"


def overhead(trials: int, rounds: int) -> Iterator[str]:
    """Seconds and memory of trials that do nothing."""
    bare, ours, own, grown = [], [], [], []
    for _ in range(rounds):
        for way, into in ((_bare, bare), (_ours, ours)):
            told = _in_process(way, trials)
            into.append(told["seconds"])
            if way is _ours:
                own.append(1000 * told["own_s"] / trials)
                grown.append(told["grown_kb"] / trials)
    ratio = [b / a for a, b in zip(bare, ours, strict=True)]
    yield (
        f"{trials:,} trials that do nothing, 2 at a time, each side in a process of its own, {rounds} pairs, medians; "
        "ours writes records and spool and decides what runs."
    )
    yield ""
    yield "| | bare Ray Tune | ours | ratio | our calls, ms a trial | driver memory, kB a trial |"
    yield "|---|---|---|---|---|---|"
    each = [statistics.median(values) for values in (bare, ours, ratio, own, grown)]
    span = f"{min(ratio):.2f} to {max(ratio):.2f}"
    yield f"| seconds | {each[0]:.1f} | {each[1]:.1f} | {each[2]:.2f} ({span}) | {each[3]:.2f} | {each[4]:.0f} |"


def starts(trials: int) -> Iterator[str]:
    """Seconds from the decision that a trial begins to its first step."""
    told = _in_process(_started, trials)["start_s"]
    yield (
        f"{trials} trials of resnet18 on 48 px, one after the other on a cluster that runs: seconds from the decision "
        "that a trial begins to its first step, by the records of its first epoch."
    )
    yield ""
    yield "| first trial | later ones, median | range |"
    yield "|---|---|---|"
    yield f"| {told[0]:.2f} | {statistics.median(told[1:]):.2f} | {min(told[1:]):.2f} to {max(told[1:]):.2f} |"


def _started(trials: int) -> None:
    """A real sweep of one epoch a trial."""
    from scalecv.search.sweep import _Sweep, tune

    with _experiment({"trials": trials, "concurrent": 1}, {"epochs": 1, "batch": 16, "threads": 1}) as (_, experiment):
        decided: list[float] = []
        suggest = _Sweep.suggest

        def timed(sweep: _Sweep, name: str) -> object:
            began, found = time.time(), suggest(sweep, name)
            if isinstance(found, dict):
                decided.append(began)
            return found

        _Sweep.suggest = timed  # type: ignore[method-assign,assignment]
        tune(experiment)
        began = []
        for number in range(trials):
            lines = Path(f"runs/sweep/runs/sweep-{number:04d}/001/spool.jsonl").read_text().splitlines()
            points = [json.loads(line) for line in lines]
            (end,) = [one for one in points if one["kind"] == "metrics" and "time/train_s" in one["metrics"]]
            took = end["metrics"]["time/train_s"] + end["metrics"]["time/validation_s"]
            began.append(end["time_ms"] / 1000 - took - decided[number])
        print(json.dumps({"start_s": began}))


def _in_process(way: Callable[[int], None], trials: int) -> dict[str, Any]:
    import subprocess

    code = f"from tests.reference import search_bench as b; b.{way.__name__}({trials})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def _experiment(search: dict[str, Any], train: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A new folder in which the command stands, with Ray, a dataset of shapes and an experiment that searches on it."""
    import ray

    from scalecv import config
    from scalecv.shards.ingest import IngestOptions, ingest
    from tests import make

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make.shapes(Path("images"))
        ingest(IngestOptions(source="images", to="data", layout="imagefolder", concurrency=0))
        space = {"train.lr": {"loguniform": [1e-4, 1e-1]}, "model.norm": {"choice": ["group", "batch"]}}
        tree = {"name": "sweep", "task": "classify", "data": {"uri": f"{folder}/data"}, "model": {"arch": "resnet18"}}
        search = {"space": space, "finalists": 0, "scheduler": "none", **search}
        yield folder, config.build({**tree, "train": train, "search": search, "scale": {"workers": 0}}, "bench")


def _bare(trials: int) -> None:
    """Ray Tune alone: as many samples of a function that reports once."""
    import ray
    from ray import tune

    os.environ.update({"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"})
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    def empty(config: dict[str, float]) -> None:
        tune.report({"value": config["x"]})

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        tune.Tuner(
            tune.with_resources(empty, {"CPU": 1}),
            param_space={"x": tune.uniform(0, 1)},
            tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True, max_concurrent_trials=2),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        print(json.dumps({"seconds": time.perf_counter() - began}))


def _ours(trials: int) -> None:
    """A sweep of the product whose segments do nothing."""
    from scalecv.search import ray_tune
    from scalecv.search.approval import approval
    from scalecv.search.ledger import Ledger
    from scalecv.search.prepare import prepared
    from scalecv.search.sweep import _Sweep
    from scalecv.shards.store import open_dataset

    with _experiment({"trials": trials, "rung": "1epochs"}, {"epochs": 9}) as (folder, experiment):
        experiment = prepared(experiment)
        approve = approval(open_dataset(f"{folder}/data").manifest)
        sweep = _Sweep(experiment, Ledger(f"{folder}/home", experiment), approve, lambda _: None)
        own = [0.0]

        def timed(call: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object) -> object:
                began = time.perf_counter()
                try:
                    return call(*args)
                finally:
                    own[0] += time.perf_counter() - began

            return run

        sweep.suggest("warm")  # imports; its trial is told as dead
        sweep.ended("warm", None)
        while sweep.record.run_id is None:  # its start is no cost of a trial
            time.sleep(0.1)
        own[0], before = 0.0, _memory_kb()
        began = time.perf_counter()
        ray_tune.run(timed(sweep.suggest), timed(sweep.ended), print, f"{folder}/tune", _empty, {"CPU": 1}, 2, 0)
        seconds = time.perf_counter() - began
        assert len(sweep.ledger.trials) == trials
        sweep.record.end("FINISHED")
        print(json.dumps({"seconds": seconds, "own_s": own[0], "grown_kb": _memory_kb() - before}))


def _empty(config: dict[str, object]) -> dict[str, object]:
    points = [{"epoch": epoch, "value": 0.5, "device_s": float(epoch)} for epoch in range(1, 10)]
    return {"status": "finished", "cause": "", "metrics": {"val/accuracy": 0.5}, "device_s": 9.0, "points": points}


def _memory_kb() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Print the tables, and add them to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["curves", "verdict", "overhead"])
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    parts = {
        "curves": lambda: curves(args.sweeps),
        "verdict": lambda: verdicts(args.sweeps),
        "overhead": lambda: overhead(args.trials, args.rounds),
        "start": lambda: starts(args.trials),
    }
    lines = [f"`python -m tests.reference.search_bench {' '.join(sys.argv[1:])}`, {platform.processor() or 'x86_64'}, "]
    lines[0] += f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"
    for part in args.parts:
        more = ["", f"## {part}", "", *parts[part]()]
        print("\n".join(more), flush=True)
        lines += more
    if args.to:
        with args.to.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
