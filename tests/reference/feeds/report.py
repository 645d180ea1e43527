"""The runs as a table: medians over rounds, shares of the limit taken within a pair."""

import argparse
import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Callable
from typing import Any

from tests.reference.bench import cpu

NAMES = {
    "scalecv_feed": "scalecv",
    "litdata_chunks": "LitData",
    "webdataset_tar": "WebDataset",
    "torch_simplejpeg": "torch DataLoader, simplejpeg",
    "spdl_threads": "SPDL",
    "torch_pillow": "torch DataLoader, Pillow (its docs' way)",
    "ray_data": "Ray Data read_parquet + map_batches (its docs' way)",
}
PACKAGES = (
    "torch",
    "torchvision",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "webdataset",
    "litdata",
    "spdl-core",
    "ray",
)
Run = dict[str, Any]


def speed(run: Run) -> float:
    """Images per second of the second epoch, but for the number of images."""
    return 1 / float(run["epochs"][1]["wall_s"])


def share(run: Run, of: str) -> float | None:
    """The limit's seconds by the row's: wall_s or cpu_s of the second epoch, of the pair."""
    if not run["limit"] or "error" in run["limit"]:
        return None
    return float(run["limit"]["epochs"][1][of] / run["epochs"][1][of])


def figures_of(runs: list[Run], images: int) -> dict[str, Any]:
    """Medians of one row."""

    def median(value: Callable[[Run], float | None]) -> float | None:
        values = [one for one in map(value, runs) if one is not None]
        return statistics.median(values) if values else None

    def first(epoch: int) -> float | None:
        return median(lambda run: float(run["epochs"][epoch]["first_s"]))

    shares = [one for run in runs if (one := share(run, "cpu_s")) is not None]
    return {
        "images_per_s": median(lambda run: images * speed(run)),
        "images_per_cpu_s": median(lambda run: images / float(run["epochs"][1]["cpu_s"])),
        "wall_share_of_limit": median(lambda run: share(run, "wall_s")),
        "cpu_share_of_limit": median(lambda run: share(run, "cpu_s")),
        "cpu_share_range": [min(shares), max(shares)] if shares else None,
        "first_batch_s": [first(0), first(1)],
        "peak_mb": median(lambda run: float(run["peak_mb"])),
        "requests": median(lambda run: float(run.get("requests", 0))),
        "busy": median(lambda run: float(run["epochs"][1]["busy"])),
        "rounds": len(runs),
    }


def against_peers(results: list[Run], of: str) -> list[float]:
    """scalecv's speed by that of the best peer, round by round; each as a share of its own limit where there is one."""

    def value(run: Run) -> float:
        found = share(run, of)
        return 1 / float(run["epochs"][1][of]) if found is None else found

    ratios = []
    for number in sorted({run["round"] for run in results}):
        ours = [value(run) for run in results if run["round"] == number and run["row"] == "scalecv_feed"]
        peers = [value(r) for r in results if r["round"] == number and r["row"] in NAMES and r["row"] != "scalecv_feed"]
        if ours and peers:
            ratios.append(ours[0] / max(peers))
    return ratios


def report(results: list[Run], args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The report as markdown, and its figures."""
    failed = [run for run in results if "error" in run]
    good = [run for run in results if "error" not in run]
    rows = {
        row: figures_of([run for run in good if run["row"] == row], args.images) for row in {r["row"] for r in good}
    }
    limits = [{"limit": None, **run["limit"]} for run in good if run["limit"] and "error" not in run["limit"]]
    limit = figures_of(limits, args.images) if limits else None
    consumer = rows.pop("consumer", None)
    ratios = {of: against_peers(good, of) for of in ("cpu_s", "wall_s")}
    where = f"S3 (SeaweedFS) with {args.latency_ms:g} ms added to each request" if args.store else "local disk"
    lines = [f"# Training feeds side by side: {where}", "", *_head(args), "", *_table(rows, limit, args)]
    if consumer:
        lines += [
            "",
            f"A simulated training that takes images at {args.consumer:g} of the limit's speed and leaves the",
        ]
        lines += [f"CPU alone is kept busy for {consumer['busy']:.3f} of the second epoch (goal: at least 0.95)."]
    for of, name in {"cpu_s": "images per CPU-second", "wall_s": "images per second"}.items():
        if ratios[of]:
            spread = f"{min(ratios[of]):.2f} to {max(ratios[of]):.2f}"
            lines += [
                "",
                f"scalecv by the best peer of the round, {name}: {statistics.median(ratios[of]):.2f} ({spread}).",
            ]
    for run in failed:
        lines += [
            "",
            f"Round {run['round']}, {NAMES.get(run['row'], run['row'])} failed: `{run['error'][-200:].strip()!r}`",
        ]
    figures = {"limit": limit, "rows": rows, "consumer": consumer, "against_best_peer": ratios}
    return "\n".join(lines) + "\n", figures


def _head(args: argparse.Namespace) -> list[str]:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    command = f"--data DIR --images {args.images} --rounds {args.rounds} --workers {args.workers} --batch {args.batch}"
    command += f" --store {args.store} --latency-ms {args.latency_ms:g}" if args.store else ""
    today = datetime.datetime.now(datetime.UTC).date()
    return [
        f"{today}, {cpu()}, Python {platform.python_version()}. {', '.join(versions)}.",
        "",
        f"{args.images} JPEGs of about 27 kB, short side about 256 px; random resized crop to 224 px (area 0.08 to 1,",
        "ratio 3:4 to 4:3) and mirroring of half of them, uint8 batches of "
        f"{args.batch}, {args.workers} workers or decoding threads.",
        "",
        "```",
        f'make bench-feeds BENCH_ARGS="{command}"',
        "```",
        "",
        "Speed and CPU time of the second epoch; CPU time and memory (proportional share) over the whole tree of",
        "processes; shares of the limit within a pair of runs side by side; medians over rounds. Each image came",
        "exactly once in each epoch, else the row would have failed. How the limit is measured:",
        "[decision 0016](../decisions/0016-feeds-side-by-side.md).",
    ]


def _table(rows: dict[str, Any], limit: dict[str, Any] | None, args: argparse.Namespace) -> list[str]:
    extra = [" requests, 2 epochs |"] if args.store else []
    names = "feed | images/s | images per CPU-second | share of limit, wall | share of limit, CPU (range)"
    lines = [
        f"| {names} | first batch, epochs 1 / 2, s | peak MB |{''.join(extra)}",
        "|---|---|---|---|---|---|---|" + "---|" * len(extra),
    ]
    best_first = sorted((row for row in rows), key=lambda row: -rows[row]["images_per_cpu_s"])
    for row in [*(["limit"] if limit else []), *best_first]:
        one = limit if row == "limit" else rows[row]
        assert one
        of_limit = ["1", "1"]
        if row != "limit":
            low_high = one["cpu_share_range"]
            between = f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else ""
            of_limit = [_number(one["wall_share_of_limit"]), _number(one["cpu_share_of_limit"]) + between]
        first = " / ".join(_number(value) for value in one["first_batch_s"])
        cells = [
            NAMES.get(row, "the limit"),
            f"{one['images_per_s']:,.0f}",
            f"{one['images_per_cpu_s']:,.0f}",
            *of_limit,
        ]
        cells += [first, f"{one['peak_mb']:,.0f}", *([f"{one['requests']:,.0f}"] if args.store else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
