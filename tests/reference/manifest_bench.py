"""Datasets of many rows: what it costs to open one and to find the order of an epoch.

    python -m tests.reference.manifest_bench [--rows 1000000 10000000 50000000] [--to docs/benchmarks/manifests.md]

Commits a manifest as `scalecv ingest` would leave it, without the shards; then a fresh process opens it, makes the
plan of the training split, and asks for the first rows. Opening and planning read no shard.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD_BYTES = 128 << 20
GROUP_BYTES = 4 << 20
BATCH = 128
RANKS = 8
WINDOW_BYTES = 256 << 20
SIZES = (3_000, 27_000, 110_000)
"""Bytes of one image."""


def write(folder: Path, rows: int, image_bytes: int) -> int:
    """Commit a dataset of that many images; the bytes of its manifest."""
    from scalecv.shards import manifest as manifests
    from scalecv.shards.commit import commit
    from scalecv.shards.manifest import Manifest, Shard

    per_group = -(-GROUP_BYTES // image_bytes)
    per_shard = SHARD_BYTES // image_bytes
    shards, left = [], rows
    while left:
        in_shard = min(per_shard, left)
        left -= in_shard
        counts = [per_group] * (in_shard // per_group) + ([in_shard % per_group] if in_shard % per_group else [])
        sha256 = hashlib.sha256(f"shard {left}".encode()).hexdigest()
        starts = [4 + sum(counts[:i]) * (image_bytes + 150) for i in range(len(counts) + 1)]
        shards.append(
            Shard(
                path=f"split=train/{sha256}.parquet",
                split="train",
                size_bytes=starts[-1] + 20_000,
                sha256=sha256,
                row_groups=tuple(counts),
                footer_bytes=20_000,
                byte_ranges=tuple(itertools.pairwise(starts)),
                footer_sha256=hashlib.sha256(f"footer {left}".encode()).hexdigest(),
                group_sha256=tuple(hashlib.sha256(f"{left} {i}".encode()).hexdigest() for i in range(len(counts))),
            )
        )
    manifest = Manifest(
        layout="imagefolder",
        source="s3://bucket/images",
        created_at="2020-01-01T00:00:00+00:00",
        fingerprint="",
        kind="label",
        classes=("a", "b"),
        class_counts={"train": {"a": rows // 2, "b": rows - rows // 2}},
        splits={"train": rows},
        sizes_px=(32, 32, 512, 512),
        formats={"JPEG": rows},
        stats={},
        band_counts={"uint8x3": rows},
        encoded_bytes=rows * image_bytes,
        shards=tuple(shards),
    )
    manifest = manifest.model_copy(update={"fingerprint": manifests.fingerprint(manifest)})
    commit(str(folder), manifest, manifest.shards, None, {})
    return next((folder / "_facts").glob("*.json")).stat().st_size


def measure(folder: str) -> dict[str, float]:
    """Open the dataset and plan an epoch of its training split, in this process."""
    import pyarrow  # noqa: F401 - any reader of row groups needs it: not part of what opening costs

    from scalecv.batches.plan import Plan, order_key
    from scalecv.shards.store import open_dataset

    before_mb = _rss_mb()
    began = time.perf_counter()
    dataset = open_dataset(folder)
    opened = time.perf_counter()
    manifest = dataset.manifest
    shards = manifest.shards_of("train")

    def plan(epoch: int) -> Plan:
        return Plan(
            tuple(count for shard in shards for count in shard.row_groups),
            BATCH * RANKS,
            order_key(manifest.fingerprint, "train", 0, epoch),
            True,
            WINDOW_BYTES * manifest.rows // manifest.encoded_bytes,
        )

    first = plan(0)
    first.picks(0, 3, RANKS)
    planned = time.perf_counter()
    for step in range(1, 101):
        first.picks(step, 3, RANKS)
    picked = time.perf_counter()
    second = plan(1)
    reads = second.reads(0, 3, RANKS)
    next(reads)
    ahead = time.perf_counter()
    return {
        "open_s": opened - began,
        "order_s": planned - opened,
        "picks_ms": (picked - planned) * 10,
        "reads_s": ahead - picked,
        "rss_mb": _peak_mb(),
        "before_mb": before_mb,
        "groups": len(first.group_rows),
        "shards": len(shards),
    }


def _rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 50_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--only", help="measure a dataset that is there, and print")
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measure(asked.only)))
        return
    lines = []
    for image_bytes in SIZES:
        for rows in asked.rows:
            with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
                manifest_bytes = write(Path(folder) / "ds", rows, image_bytes)
                command = [sys.executable, "-m", "tests.reference.manifest_bench", "--only", f"{folder}/ds"]
                runs = [
                    json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                    for _ in range(asked.repeats)
                ]
            one = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            lines.append(
                f"| {image_bytes / 1000:g} kB | {rows / 1e6:g} M | {one['shards']:,} | {one['groups']:,} "
                f"| {manifest_bytes / 1e6:.1f} | {one['open_s']:.2f} | {one['order_s']:.2f} | {one['reads_s']:.2f} "
                f"| {one['picks_ms']:.2f} | {one['rss_mb']:.0f} ({one['before_mb']:.0f}) |"
            )
            print(lines[-1], flush=True)
    if asked.to:
        asked.to.write_text(_report(lines, asked.repeats))


def _report(lines: list[str], repeats: int) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return "\n".join(
        [
            "# Datasets of many rows",
            "",
            f"`{' '.join(['python -m tests.reference.manifest_bench', *sys.argv[1:]])}` on {today}, "
            f"Python {platform.python_version()}, local disk, medians of {repeats} fresh processes.",
            "",
            f"Shards of {SHARD_BYTES >> 20} MB with row groups of {GROUP_BYTES >> 20} MB, global batches of "
            f"{BATCH * RANKS} on {RANKS} ranks, a window of {WINDOW_BYTES >> 20} MB. *Open*: `open_dataset`, from the "
            "commit to the checked manifest. *Order*: `Plan` and the rows of the first step of one rank. *Reads*: a "
            "new epoch's plan until the first row groups to fetch are known. *Step*: the rows of one further step. "
            "*Memory*: peak RSS, and in brackets what the process held before it opened the dataset.",
            "",
            "| image | rows | shards | row groups | manifest, MB | open, s | order, s | reads, s | step, ms "
            "| memory, MB |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
