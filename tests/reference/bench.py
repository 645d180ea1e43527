"""Training throughput of scalecv against the plain PyTorch script: paired runs, medians, ratio with spread.

    make bench BENCH_ARGS="--folder GTSRB --pairs 5 --to docs/benchmarks/training_throughput.md"

FOLDER holds train/CLASS and val/CLASS. Both sides train the same ResNet-18 on the same images with the same
augmentation, batch size and threads, in turns, so that a busy machine troubles both alike. A side's figure is the
median over its epochs of images per second while training (validation left out); the ratio is taken within a pair.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def plain(folder: Path, epochs: int, threads: int) -> float:
    command = [sys.executable, "-m", "tests.reference.plain_pytorch", str(folder), "--json"]
    command += [f"--epochs={epochs}", f"--threads={threads}", "--workers=2"]
    return float(json.loads(run(command, ROOT).splitlines()[-1])["images_per_s"])


def scalecv(dataset: Path, epochs: int, threads: int, workers: int, cwd: str, number: int) -> float:
    command = [sys.executable, "-m", "scalecv", "train", str(ROOT / "experiments/gtsrb_resnet18.yaml"), "--json"]
    command += [f"data.uri={dataset}", f"train.epochs={epochs}", f"train.threads={threads}", "--quiet"]
    command += [f"scale.workers={workers}", f"name=bench-{workers}-{number}", "track.pictures=0"]
    return float(json.loads(run(command, Path(cwd)).splitlines()[-1])["images_per_s"])


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def cpu() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--folder", type=Path, required=True)
    ask.add_argument("--pairs", type=int, default=5)
    ask.add_argument("--epochs", type=int, default=4)
    ask.add_argument("--to", type=Path)
    args = ask.parse_args()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as cwd:
        dataset = Path(cwd) / "dataset"
        ingest = [sys.executable, "-m", "scalecv", "ingest", str(args.folder), "--to", str(dataset)]
        run([*ingest, "--layout", "imagefolder", "--concurrency", "0", "--quiet"], Path(cwd))
        rows = []
        for number in range(args.pairs):
            row = {"plain": plain(args.folder, args.epochs, threads)}
            for workers in (0, 1):
                row[f"scalecv, workers={workers}"] = scalecv(dataset, args.epochs, threads, workers, cwd, number)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    text = report(rows, args, threads)
    print(text)
    if args.to:
        args.to.write_text(text)


def report(rows: list[dict[str, float]], args: argparse.Namespace, threads: int) -> str:
    lines = [
        "# Training throughput against plain PyTorch",
        "",
        f"{time.strftime('%Y-%m-%d')}, {cpu()}, {threads} threads, Python {platform.python_version()}.",
        "ResNet-18 at 64 px, batch 64, AdamW, affine and brightness augmentation, GTSRB sample.",
        f"{args.pairs} pairs of {args.epochs} epochs, each side in turn.",
        "Figures are images/s while training, median of the epochs of a run.",
        "",
        "    make bench BENCH_ARGS='--folder GTSRB --pairs "
        f"{args.pairs} --epochs {args.epochs} --to docs/benchmarks/training_throughput.md'",
        "",
        "| side | median images/s | min | max | ratio to plain, median | min | max |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in rows[0]:
        speeds = [row[side] for row in rows]
        ratios = [row[side] / row["plain"] for row in rows]
        figures = [statistics.median(speeds), min(speeds), max(speeds)]
        shares = [statistics.median(ratios), min(ratios), max(ratios)]
        cells = [f"{f:.1f}" for f in figures] + [f"{s:.3f}" for s in shares]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
