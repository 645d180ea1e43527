"""Segmentation of the same tiles at 1, 2 and 4 times their side, with the same batch: time and memory for each pixel.

    python -m tests.reference.upscale_bench --tiles TILES --steps 3 --to docs/benchmarks/upscale.md

TILES is a folder of masks layout (experiments/pv_unet.yaml tells where it comes from). Each factor is a process of its
own that trains experiments/pv_unet.yaml with `data.size_px` = factor x 256 and a batch of 5, with
`train.micro_batch=auto` and, in a second row, `train.recompute=true`. A figure is the median of the steps after the
first; the peak is that of the process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from scalecv import config
from tests.reference.bench import ROOT, cpu

SIDE_PX, BATCH = 256, 5


class Enough(Exception):
    """All steps that count are done."""


def measure(data: str, factor: int, recompute: bool, steps: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train some steps in this process."""
    from scalecv.train.job import Job, Place
    from scalecv.train.worker import work

    tree = yaml.safe_load((ROOT / "experiments/pv_unet.yaml").read_text())
    keys = {
        "name": f"x{factor}",
        "data.uri": data,
        "data.size_px": factor * SIDE_PX,
        "train.batch": BATCH,
        "train.epochs": epochs,
        "train.micro_batch": "auto",
        "train.recompute": recompute,
        "scale.workers": 0,
        "track.log_every": 1,
        "track.pictures": 0,
        "track.checkpoint_minutes": 1000,
        "track.storage": str(folder),
    }
    points: list[dict[str, float]] = []
    said: list[str] = []

    def report(events: list[dict[str, Any]]) -> None:
        for event in events:
            said.extend([event["message"]] if "micro_batch" in event.get("message", "") else [])
            if event["kind"] == "metrics" and "time/compute_s" in event["metrics"]:
                points.append(event["metrics"])
        if len(points) > steps:
            raise Enough

    experiment = config.build(config.with_overrides(tree, keys), "bench")
    try:
        work(Job(experiment, 0, str(folder / f"x{factor}-{recompute}"), "threads"), Place(), report)
    except Enough:
        pass
    took = statistics.median(sum(one[f"time/{part}_s"] for part in PARTS) for one in points[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"factor": factor, "recompute": recompute, "step_s": took, "peak_gb": peak, "said": (said or [""])[0]}


PARTS = ("transfer", "compute", "sync", "optimizer")


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        "# Upscaled segmentation with the same batch",
        "",
        f"{time.strftime('%Y-%m-%d')}, {cpu()}, no GPU. experiments/pv_unet.yaml (U-Net, ResNet-18), a batch of",
        f"{BATCH}, `train.micro_batch=auto`; tiles of {SIDE_PX} px at 1, 2 and 4 times their side; median of",
        f"{args.steps} steps.",
        "",
        f"    python -m tests.reference.upscale_bench --tiles TILES --steps {args.steps}",
        "",
        "| factor | recompute | s per step | ns per pixel | against factor 1 (goal ≤ 1.3) | peak of the process, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cost = [one["step_s"] / (BATCH * (one["factor"] * SIDE_PX) ** 2) * 1e9 for one in (row, first(rows, row))]
        recompute = "yes" if row["recompute"] else "no"
        cells = [f"x{row['factor']}", recompute, f"{row['step_s']:.2f}", f"{cost[0]:.0f}", f"{cost[0] / cost[1]:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['peak_gb']:.2f} |")
    said = [f"- x{row['factor']}{', recompute' if row['recompute'] else ''}: {row['said']}" for row in rows]
    return "\n".join([*lines, "", "What the search for a micro-batch said:", "", *said]) + "\n"


def first(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in rows if one["recompute"] == row["recompute"])


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--tiles", type=Path)
    ask.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4])
    ask.add_argument("--steps", type=int, default=3)
    ask.add_argument("--to", type=Path)
    ask.add_argument("--one", help="of this process: JSON of data, factor, recompute, steps, epochs, folder")
    args = ask.parse_args()
    if args.one:
        told = json.loads(args.one)
        print(json.dumps(measure(**{**told, "folder": Path(told["folder"])})))
        return
    env, rows = os.environ | {"PYTHONPATH": str(ROOT)}, []
    with tempfile.TemporaryDirectory(prefix="scalecv-upscale-") as folder:
        data = f"{folder}/data"
        ingest = [sys.executable, "-m", "scalecv", "ingest", str(args.tiles), "--to", data, "--layout", "masks"]
        run([*ingest, "--split-folder", "other_place=val", "--concurrency", "0", "--quiet"], folder, env)
        for factor in args.factors:
            for recompute in (False, True):
                told = {"data": data, "factor": factor, "recompute": recompute, "steps": args.steps}
                told |= {"epochs": args.steps + 1, "folder": folder}
                said = run(
                    [sys.executable, "-m", "tests.reference.upscale_bench", "--one", json.dumps(told)], folder, env
                )
                rows.append(json.loads(said.splitlines()[-1]))
                print(said, file=sys.stderr, flush=True)
    text = report(rows, args)
    print(text)
    if args.to:
        args.to.write_text(text)


def run(command: list[str], cwd: str, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:300]}\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
