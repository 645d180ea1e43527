"""Training feeds side by side: scalecv, its peers, and the limit of the machine.

    make bench-feeds BENCH_ARGS="--data DIR --images 12000 --rounds 3 --to docs/benchmarks/ingest_local.md"

Each row runs in a process of its own for two epochs, and beside each run one of the limit; the order of the rows
changes from round to round. Speed and CPU time are those of the second epoch, CPU time over the whole tree of
processes. What was measured is kept in the data folder: the same command goes on after a stop,
`--new` measures its rows again.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.reference.feeds import formats, limit
from tests.reference.feeds.report import report
from tests.reference.feeds.run import remote, run
from tests.reference.feeds.work import Work

ROWS = {
    "scalecv_feed": "",
    "torch_pillow": "torchvision",
    "torch_simplejpeg": "simplejpeg",
    "webdataset_tar": "webdataset",
    "litdata_chunks": "litdata",
    "spdl_threads": "spdl",
    "ray_data": "ray",
}
"""Module of a row -> what must be installed for it."""
REMOTE = ("scalecv_feed", "webdataset_tar", "litdata_chunks", "ray_data")
"""Rows that can read from S3 without a request for each image."""
CONSUMER = "consumer"
"""scalecv's feed with a step after each batch that takes images at a share of the limit's speed."""


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    known = [row for row in ROWS if not ROWS[row] or importlib.util.find_spec(ROWS[row])]
    rows = [row for row in args.rows or known if row in known and (not args.store or row in REMOTE)]
    for row in sorted({*(args.rows or ROWS)} - {*known}):
        print(
            f"no row {row}: {ROWS.get(row, 'it')} is not there (make bench-feeds installs the peers)", file=sys.stderr
        )
    args.data.mkdir(parents=True, exist_ok=True)
    no_limit = limit.build(args.data)
    if no_limit:
        print(f"no limit row: {no_limit}", file=sys.stderr)
    wanted = {form for row in rows for form in importlib.import_module(f"tests.reference.feeds.{row}").FORMATS}
    formats.write_formats(args.data, args.images, wanted | {"packed"}, args.workers)
    work = Work(str(args.data.resolve()), args.images, args.batch, args.workers)
    kept = (
        args.data
        / f"results-{args.store or 'local'}-{args.latency_ms if args.store else 0}-{args.batch}-{args.workers}.json"
    )
    results: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    order = [*rows, *([CONSUMER] if "scalecv_feed" in rows and not no_limit and args.consumer else [])]
    results = [one for one in results if not args.new or one["row"] not in order]
    with ExitStack() as stack:
        theirs, requests = work, None
        if args.store:
            store, requests = remote(stack, args.latency_ms / 1000)
            formats.copy_to(store.direct, args.data, wanted)
            theirs = replace(work, store=store.delayed)
        for number in range(args.rounds):
            for row in order[number % len(order) :] + order[: number % len(order)]:
                if any((one["round"], one["row"]) == (number, row) for one in results):
                    continue
                result: dict[str, Any] = {
                    "round": number,
                    "row": row,
                    "limit": None if no_limit else run("limit", work),
                }
                before = requests() if requests else 0
                if row == CONSUMER:
                    rate = args.consumer * args.images / result["limit"]["epochs"][1]["wall_s"]
                    result |= run("scalecv_feed", theirs, rate)
                else:
                    result |= run(row, theirs)
                result["requests"] = requests() - before if requests else 0
                results.append(result)
                kept.write_text(json.dumps(results))
                print(json.dumps(result), file=sys.stderr, flush=True)
    text, figures = report(results, args)
    print(text)
    if args.to:
        args.to.write_text(text)
    if args.json:
        args.json.write_text(json.dumps({"figures": figures, "runs": results}, indent=1))


def arguments() -> argparse.Namespace:
    ask = argparse.ArgumentParser(prog="python -m tests.reference.feeds")
    ask.add_argument("--data", type=Path, required=True, help="folder for the images in all formats; made once")
    ask.add_argument("--images", type=int, default=12_000)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    ask.add_argument("--batch", type=int, default=128)
    ask.add_argument("--rows", nargs="*", choices=[*ROWS], help="all that are installed by default")
    ask.add_argument("--store", choices=["s3"], help="read from an S3 server of this machine, with latency")
    ask.add_argument("--latency-ms", type=float, default=20.0, help="added to each request")
    ask.add_argument(
        "--consumer", type=float, default=0.8, help="speed of the simulated training by the limit's; 0: none"
    )
    ask.add_argument("--new", action="store_true", help="measure the rows again that were measured")
    ask.add_argument("--to", type=Path, help="write the report to this file")
    ask.add_argument("--json", type=Path, help="write all figures to this file")
    return ask.parse_args()


if __name__ == "__main__":
    main()
