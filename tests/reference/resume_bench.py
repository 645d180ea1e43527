"""Time to the first batch of an epoch, from its start and at 90 % of it, in turns; and how well the order mixes.

    python -m tests.reference.resume_bench --rows 200000 --pairs 7 [--reader ray] [--to docs/benchmarks/resume.md]

The dataset is made of a few hundred noisy JPEG files that repeat under new ids, written by the shard writer of the
ingest. Each figure is a fresh feed with nothing kept and no footer known.

Mixing: distinct shards in a batch, as a share of what a full shuffle would give (expected value), mean over batches;
and the distance between rows of one shard in the epoch, as a share of the epoch, against 1/3 of a full shuffle.
"""

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image

from scalecv import runtime, storage
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import Pixels
from scalecv.batches.plan import Plan
from scalecv.shards import manifest as manifests
from scalecv.shards import row_groups
from scalecv.shards.manifest import BandStats, Manifest, Shard
from scalecv.shards.store import Dataset
from scalecv.shards.write import ShardWriter

SIZE_PX = 128


def make(uri: str, rows: int, shard_mb: int, row_group_mb: float) -> Dataset:
    """A dataset of `rows` rows; nothing is committed, the manifest is enough for a feed."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(200):
        small = rng.integers(0, 256, (SIZE_PX // 8, SIZE_PX // 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        PIL.Image.fromarray(small).resize((SIZE_PX, SIZE_PX), PIL.Image.Resampling.BILINEAR).save(out, "JPEG")
        pictures.append(out.getvalue())
    shards: list[Shard] = []
    writer, held = ShardWriter((), int(row_group_mb * (1 << 20))), 0
    for number in range(rows):
        data = pictures[number % len(pictures)]
        facts = {"width": SIZE_PX, "height": SIZE_PX, "bands": 3, "format": "JPEG", "nodata": None, "group": ""}
        file = {"bytes": data, "path": f"{number}.jpg"}
        row = {"id": f"{number:032x}", "sha256": "", "label": "ab"[number % 2], "image": file, "mask": None}
        writer.add(row | facts)
        held += len(data)
        if held >= shard_mb << 20 or number == rows - 1:
            content, shard = writer.close("train")
            storage.put(storage.join(uri, shard.path), content)
            shards.append(shard)
            writer, held = ShardWriter((), int(row_group_mb * (1 << 20))), 0
    stats = BandStats(rows=rows, pixels=1, mean=(0.0,) * 3, std=(1.0,) * 3, min=(0.0,) * 3, max=(255.0,) * 3)
    told = Manifest(
        layout="synthetic",
        source="",
        created_at="",
        fingerprint="",
        kind="label",
        classes=("a", "b"),
        splits={"train": rows},
        sizes_px=(SIZE_PX,) * 4,
        formats={"JPEG": rows},
        stats={"uint8x3": stats},
        band_counts={"uint8x3": rows},
        encoded_bytes=sum(len(pictures[n % len(pictures)]) for n in range(rows)),
        shards=tuple(shards),
    )
    return Dataset(uri, 0, told.model_copy(update={"fingerprint": manifests.fingerprint(told)}))


def first_batch_s(dataset: Dataset, args: argparse.Namespace, share: float) -> float:
    """Seconds from asking for an epoch to its first batch, begun at a share of its steps."""
    pixels = Pixels(None, "rgb", 3, "uint8", "uint8", SIZE_PX, "stretch", (0.0,) * 3, (1.0,) * 3, ("a", "b"))
    feed = Feed(
        dataset, "train", pixels, args.batch, is_training=True, window_mb=args.window_mb, threads=1, reader=args.reader
    )
    row_groups.footers.cache_clear()
    start = int(feed.plan(0).steps * share)
    began = time.perf_counter()
    epoch = feed.epoch(0, start)
    next(iter(epoch))
    took = time.perf_counter() - began
    epoch.close()
    return took


def mixing(dataset: Dataset, plan: Plan, samples: int = 200) -> tuple[float, float]:
    """Distinct shards in a batch against a full shuffle, and the mean distance of rows of one shard times three."""
    shard_of = np.array([n for n, shard in enumerate(dataset.manifest.shards) for _ in shard.row_groups])
    shares = np.bincount(shard_of, weights=np.asarray(plan.group_rows)) / plan.rows
    expected = float((1 - (1 - shares) ** plan.batch).sum())
    steps = np.linspace(0, plan.steps - 1, min(samples, plan.steps)).astype(int)
    distinct, places = [], [[] for _ in dataset.manifest.shards]
    for step in steps.tolist():
        picks = plan.picks(step)
        shards = shard_of[picks.group[picks.valid]]
        distinct.append(len(set(shards.tolist())))
        for shard in shards.tolist():
            places[shard].append(step / plan.steps)
    apart = [float(np.abs(np.subtract.outer(at, at)).mean()) for at in map(np.asarray, places) if len(at) > 1]
    return statistics.mean(distinct) / expected, 3 * statistics.mean(apart)


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--rows", type=int, default=200_000)
    ask.add_argument("--batch", type=int, default=128)
    ask.add_argument("--window-mb", type=int, default=128)
    ask.add_argument("--shard-mb", type=int, default=64)
    ask.add_argument("--row-group-mb", type=float, default=4)
    ask.add_argument("--pairs", type=int, default=7)
    ask.add_argument("--reader", choices=["threads", "ray"], default="threads")
    ask.add_argument("--folder", help="where the dataset is made: a folder or a bucket; empty takes a temporary one")
    ask.add_argument("--to", type=Path)
    args = ask.parse_args()
    if args.reader == "ray":
        runtime.connect()  # of our own: Ray would join any cluster that it finds on this machine
    with tempfile.TemporaryDirectory() as temporary:
        dataset = make(args.folder or temporary, args.rows, args.shard_mb, args.row_group_mb)
        for share in (0.0, 0.9):
            first_batch_s(dataset, args, share)  # imports, and files into the page cache
        pairs = [(first_batch_s(dataset, args, 0.0), first_batch_s(dataset, args, 0.9)) for _ in range(args.pairs)]
        feed = Feed(dataset, "train", None, args.batch, is_training=True, window_mb=args.window_mb)  # type: ignore[arg-type]
        plan = feed.plan(0)
        distinct, apart = mixing(dataset, plan)
    ratios = [late / fresh for fresh, late in pairs]
    lines = [
        "# Resume at 90 % of an epoch, and mixing",
        "",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs, Python {platform.python_version()}.",
        f"{args.rows:,} rows of {dataset.manifest.encoded_bytes / args.rows / 1000:.1f} kB, {len(plan.group_rows)} row "
        f"groups, {len(dataset.manifest.shards)} shards, batch {args.batch}, window {args.window_mb} MB, "
        f"reader {args.reader}, {args.pairs} pairs.",
        "",
        "| figure | median | min | max |",
        "|---|---|---|---|",
    ]
    for name, values in (
        ("first batch, fresh, s", [fresh for fresh, _ in pairs]),
        ("first batch, at 90 %, s", [late for _, late in pairs]),
        ("ratio within a pair", ratios),
    ):
        lines.append(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    lines += [
        "",
        f"Distinct shards in a batch: {distinct:.3f} of a full shuffle's. "
        f"Spread of a shard's rows over the epoch: {apart:.3f} of a full shuffle's.",
    ]
    print("\n".join(lines))
    if args.to:
        args.to.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
