"""What Ray's TorchTrainer costs beside torchrun, and what a second rank costs: the same network, images and batches.

    python -m tests.reference.ranks_bench --pairs 3 --epochs 9 --skip 4 --images 4000 [--rows rows.jsonl]

Sides of a pair, in turns:
    trainer     scalecv train scale.workers=2: the ranks are workers of Ray's TorchTrainer
    torchrun    two ranks of the same loop under torchrun, without Ray
    plain       a plain PyTorch loop under torchrun: DistributedDataParallel, DataLoader, the same network
    alone       the loop of `torchrun` with one rank and half the batch, so that a rank's work is the same
    one_worker  scalecv train scale.workers=1 with that batch: on two CPUs Ray's own processes have the other one

Figures are of the epochs of a run after the first `--skip`, in which the command itself still begins: images per second
by the wall clock, and CPU-seconds of the ranks' processes (their own threads and the plain loop's loaders) for each
image.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scalecv import config
from scalecv.shards.ingest import IngestOptions, ingest
from tests import make
from tests.reference.bench import ROOT, cpu

SIDES = ("trainer", "torchrun", "plain", "alone", "one_worker")
WORKERS = {"trainer": 2, "one_worker": 1}
SIZE_PX, BATCH = 64, 64


def cpu_s() -> float:
    """CPU-seconds of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def experiment(folder: Path, side: str, epochs: int) -> dict[str, Any]:
    ranks = 1 if side in ("alone", "one_worker") else 2
    return {
        "name": f"{side}-{time.time_ns()}",
        "task": "classify",
        "data.uri": str(folder / "data"),
        "data.augment.hflip": 0.5,
        "data.decode_threads": 1,
        "model.arch": "resnet10",
        "train.epochs": epochs,
        "train.batch": BATCH // 2 * ranks,
        "train.threads": 1,
        "track.storage": str(folder / "runs"),
        "track.log_every": 1000,
        "track.checkpoint_minutes": 1000,
        "track.pictures": 0,
        "track.uri": f"sqlite:///{folder}/mlflow.db",
        "scale.workers": WORKERS.get(side, ranks if ranks > 1 else 0),
    }


def ours(told: str) -> None:
    """A rank of the product's loop; torchrun has set who it is."""
    from torch import distributed as dist

    from scalecv.train.job import Job, Place
    from scalecv.train.worker import work

    tree = json.loads(told)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    seen: list[tuple[float, float]] = []

    def report(events: list[dict[str, Any]]) -> None:
        for event in events:
            if "time/train_s" in event.get("metrics", {}) and event["kind"] == "metrics":
                seen.append((event["metrics"]["system/epoch_images_per_s"], cpu_s()))

    job = Job(config.build(tree["tree"], "bench"), tree["version"], tree["run"], "threads")
    work(job, Place(rank, ranks, ranks), report)
    write(seen, tree, rank)


def plain(told: str) -> None:
    """A rank of a plain loop."""
    import torch
    from torch import distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader, DistributedSampler
    from torchvision import datasets
    from torchvision.transforms import v2

    from scalecv.models.classifiers import resnet10

    tree = json.loads(told)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    steps = [v2.RGB(), v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    data = datasets.ImageFolder(
        f"{tree['folder']}/images/train", v2.Compose([*steps, v2.Normalize([0.3] * 3, [0.3] * 3)])
    )
    sampler = DistributedSampler(data)
    network = resnet10(in_channels=3, outputs=3)
    model = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seen, loss_of = [], nn.CrossEntropyLoss()
    for epoch in range(tree["epochs"]):
        sampler.set_epoch(epoch)
        began, rows = time.perf_counter(), 0
        for image, label in DataLoader(data, BATCH // 2, sampler=sampler, num_workers=1):
            loss_of(model(image), label).backward()
            nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            rows += len(label) * 2
        seen.append((rows / (time.perf_counter() - began), cpu_s()))
    write(seen, tree, int(os.environ["RANK"]))


def write(seen: list[tuple[float, float]], tree: dict[str, Any], rank: int) -> None:
    """One line for this rank: images/s of the run, and CPU-seconds of this rank for each image of the run."""
    skip = tree["skip"]
    speed = statistics.median(one for one, _ in seen[skip:])
    used = (seen[-1][1] - seen[skip - 1][1]) / (len(seen) - skip) / tree["images"]
    print(json.dumps({"rank": rank, "images_per_s": speed, "cpu_s_per_image": used}), flush=True)


def side(name: str, folder: Path, epochs: int, images: int, skip: int) -> dict[str, float]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    flat = experiment(folder, name, epochs)
    if name in WORKERS:
        (folder / "trainer.yaml").write_text(config.dump(config.build(config.with_overrides({}, flat), "bench")))
        run([sys.executable, "-m", "scalecv", "train", str(folder / "trainer.yaml"), "--quiet", "--json"], folder, env)
        spool = folder / "runs" / flat["name"] / "001" / "spool.jsonl"
        points = [json.loads(line) for line in spool.read_text().splitlines()]
        ends = [one for one in points if one["kind"] == "metrics" and "time/train_s" in one["metrics"]]
        if len(ends) != epochs:
            raise SystemExit(f"{spool} tells of {len(ends)} epochs, expected {epochs}")
        return {"images_per_s": statistics.median(one["metrics"]["system/epoch_images_per_s"] for one in ends[skip:])}
    tree = config.build(config.with_overrides({}, flat), "bench").model_dump(mode="json")
    told = {"tree": tree, "version": 0, "run": str(folder / "runs" / flat["name"] / "001"), "images": images}
    told |= {"folder": str(folder), "epochs": epochs, "skip": skip}
    count = 1 if name == "alone" else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    rank = "plain" if name == "plain" else "ours"
    said = run([*command, "-m", "tests.reference.ranks_bench", "--rank", rank, "--told", json.dumps(told)], folder, env)
    rows = [json.loads(one) for one in re.findall(r'\{"rank".*?\}', said)]  # two ranks may write into one line
    return {"images_per_s": rows[0]["images_per_s"], "cpu_s_per_image": sum(row["cpu_s_per_image"] for row in rows)}


def run(command: list[str], cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\n{done.stderr[-3000:]}")
    return done.stdout


def report(rows: list[dict[str, dict[str, float]]], args: argparse.Namespace) -> str:
    def over(key: str, one: str, other: str) -> str:
        ratios = [row[one][key] / row[other][key] for row in rows]
        return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"

    speeds = {name: statistics.median(row[name]["images_per_s"] for row in rows) for name in args.sides}
    own = [name for name in args.sides if name not in WORKERS]
    used = {name: statistics.median(row[name]["cpu_s_per_image"] for row in rows) * 1000 for name in own}
    questions = (
        ("images/s, one loop: TorchTrainer / torchrun", "images_per_s", "trainer", "torchrun", "≥ 0.97"),
        ("images/s of one rank: TorchTrainer / torchrun", "images_per_s", "one_worker", "alone", "≥ 0.97"),
        ("images/s in torchrun: the product's loop / plain", "images_per_s", "torchrun", "plain", ""),
        ("CPU of an image: one rank / two ranks", "cpu_s_per_image", "alone", "torchrun", "≥ 0.95"),
    )
    lines = [
        "# Ranks: TorchTrainer beside torchrun, and two ranks beside one",
        "",
        f"{time.strftime('%Y-%m-%d')}, {cpu()}, no GPU. resnet10 (1.2 M weights) at {SIZE_PX} px, {BATCH // 2}",
        f"images a rank and step, one thread for the network and one for decoding in each rank. {len(rows)} pairs of",
        f"{args.epochs} epochs of {args.images} images, the sides in turns; medians, in brackets the range over pairs.",
        "",
        f"    python -m tests.reference.ranks_bench --pairs {len(rows)} --epochs {args.epochs} --skip {args.skip} "
        f"--images {args.images} --sides {' '.join(args.sides)}",
        "",
        "| side | images/s | CPU-ms of all ranks for an image |",
        "|---|---|---|",
        *(f"| {name} | {speeds[name]:.1f} | {f'{used[name]:.1f}' if name in used else ''} |" for name in args.sides),
        "",
        "| question | ratio | goal |",
        "|---|---|---|",
        *(
            f"| {question} | {over(key, one, other)} | {goal} |"
            for question, key, one, other, goal in questions
            if {one, other} <= {*args.sides}
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--rank", choices=("ours", "plain"))
    ask.add_argument("--told")
    for name, default in (("pairs", 3), ("epochs", 4), ("skip", 1), ("images", 960)):
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    ask.add_argument("--rows", type=Path, default=Path("/dev/null"), help="file of the pairs, read and appended to")
    ask.add_argument("--to", type=Path)
    args = ask.parse_args()
    if args.rank:
        (plain if args.rank == "plain" else ours)(args.told)
        return
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.is_file() else []
    with tempfile.TemporaryDirectory(prefix="scalecv-ranks-") as name:
        folder = Path(name)
        make.shapes(folder / "images" / "train", args.images, SIZE_PX)
        make.shapes(folder / "images" / "val", 30, SIZE_PX, seed=1)
        told = {"source": str(folder / "images"), "to": str(folder / "data"), "layout": "imagefolder"}
        ingest(IngestOptions(**told, concurrency=0))
        for _ in range(args.pairs):
            order = args.sides if len(rows) % 2 == 0 else args.sides[::-1]
            rows.append({name: side(name, folder, args.epochs, args.images, args.skip) for name in order})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    text = report(rows, args)
    print(text)
    if args.to:
        args.to.write_text(text)


if __name__ == "__main__":
    main()
