"""Reading from a bucket against reading from a local disk: the reader alone, and the whole feed, in pairs.

    python -m tests.reference.store_bench --pairs 3 --to docs/benchmarks/store_reads.md

Synthetic JPEGs of 256 px and about 27 kB lie in shards of 128 MB on a local disk. The bucket is the same files behind
an HTTP server on loopback that speaks enough of S3 for ranged reads (any credentials, sendfile, a thread for each
connection) and answers each request after the given latency. So it costs little CPU, as a distant store does; what it
does cost is on the same cores as the feed and counts against it. In each pair all sides run one after the other.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from scalecv.batches import reader
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import pixels_of
from scalecv.config import Cache, Data
from scalecv.shards import manifest as manifests
from scalecv.shards import row_groups
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import Dataset, _cache_of, open_dataset, read_rows
from scalecv.shards.write import ShardWriter

BATCH = 128


class Ranges(socketserver.StreamRequestHandler):
    """GET with a range, as S3 answers it, after a while."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while line := self.rfile.readline().split():
            headers = {}
            while header := self.rfile.readline().strip():
                name, _, value = header.decode().partition(":")
                headers[name.lower()] = value.strip()
            time.sleep(self.server.latency_s)
            self._answer(line[1].decode(), headers.get("range", ""))

    def _answer(self, path: str, asked: str) -> None:
        with open(self.server.root / path.lstrip("/").replace("%3D", "=").partition("/")[2], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, size)
            self.wfile.write(
                f'HTTP/1.1 206 Partial Content\r\nContent-Length: {end - start}\r\nETag: "1"\r\n'
                f"Content-Range: bytes {start}-{end - 1}/{size}\r\n"
                "Last-Modified: Sat, 01 Jan 2000 00:00:00 GMT\r\n\r\n".encode()
            )
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up."""


@contextlib.contextmanager
def store(root: Path, latency_s: float) -> Iterator[None]:
    """The server in a process of its own, and the variables that lead to it."""
    command = [sys.executable, "-m", "tests.reference.store_bench", "--serve", str(root), "--latency", str(latency_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": process.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
        }
        yield
    finally:
        process.kill()
        process.wait()


def made(folder: Path, rows: int) -> Dataset:
    """A dataset of `rows` rows: 64 pictures again and again under new ids."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(64):
        path = folder / "source" / f"c{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = np.asarray(
            Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).resize((256, 256)), np.int16
        )
        noisy = np.clip(smooth + draw.normal(0, 14, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=82)
    ingest(IngestOptions(source=str(folder / "source"), to=str(folder / "data"), layout="imagefolder", concurrency=0))
    dataset = open_dataset(str(folder / "data"))
    some = [row for table in read_rows(dataset.uri, dataset.manifest.shards) for row in table.to_pylist()]
    row_bytes = statistics.mean(len(row["image"]["bytes"]) for row in some)
    shards, each = [], int((128 << 20) / row_bytes)
    for first in range(0, rows, each):
        writer = ShardWriter((), 4 << 20)
        for number in range(first, min(first + each, rows)):
            writer.add({**some[number % 64], "id": hashlib.sha256(b"%d" % number).hexdigest()[:32]})
        data, shard = writer.close("train")
        (folder / "data" / shard.path).write_bytes(data)
        shards.append(shard)
    told = dataset.manifest.model_copy(
        update={"shards": tuple(shards), "splits": {"train": rows}, "encoded_bytes": int(rows * row_bytes)}
    )
    return Dataset(dataset.uri, 0, told.model_copy(update={"fingerprint": manifests.fingerprint(told)}))


def feed_of(dataset: Dataset, seed: int) -> Feed:
    data = Data(uri=dataset.uri, size_px=224, augment={"resized_crop": (0.35, 1.0), "hflip": 0.5})
    pixels = pixels_of(dataset.manifest, data, dataset.uri)
    return Feed(dataset, "train", pixels, BATCH, seed=seed, is_training=True, threads=os.cpu_count() or 1)


def measured(dataset: Dataset, epoch: int, alone: bool) -> dict[str, float]:
    """One epoch: MB/s of the reader alone, or images/s of the feed."""
    row_groups.footers.cache_clear()
    dataset = replace(dataset, reads=row_groups.Reads())
    feed = feed_of(dataset, seed=0)
    began, cpu, first_s, images, size = time.perf_counter(), time.process_time(), 0.0, 0, 0
    if alone:
        order = (group for _, fetch, _ in feed.plan(epoch).reads(0) for group in fetch)
        for table in reader.threads_reader(dataset, feed.groups, order):
            first_s = first_s or time.perf_counter() - began
            size += table.nbytes
    else:
        for _, batch in feed.epoch(epoch):
            first_s = first_s or time.perf_counter() - began
            images += len(batch["id"])
    took = time.perf_counter() - began
    reads = dataset.reads
    return {
        "rate": size / took / 1e6 if alone else images / took,
        "first_s": first_s,
        "cpu_share": (time.process_time() - cpu) / took,
        "gets": reads.gets,
        "wait_s": reads.wait_s,
        "get_s": reads.get_s / max(1, reads.gets),
    }


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--serve", type=Path)
    ask.add_argument("--latency", type=float, default=0.0)
    ask.add_argument("--rows", type=int, default=12_000)
    ask.add_argument("--pairs", type=int, default=3)
    ask.add_argument("--folder", type=Path)
    ask.add_argument("--to", type=Path)
    args = ask.parse_args()
    if args.serve:
        with Server(("127.0.0.1", 0), Ranges) as server:
            server.root, server.latency_s = args.serve, args.latency
            print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
            server.serve_forever()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        text = bench(folder, args)
    print(text)
    if args.to:
        args.to.write_text(text)


def bench(folder: Path, args: argparse.Namespace) -> str:
    local = made(folder, args.rows)
    remote = replace(local, uri="s3://bucket/data")
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    measured(local, 0, alone=False)  # imports, page cache
    for pair in range(args.pairs):
        for alone in (True, False):
            sides = [("local disk", None), *((f"bucket, {ms} ms", ms / 1000) for ms in (0, 20, 50))]
            random.Random(pair).shuffle(sides)
            for side, latency_s in sides:
                with contextlib.nullcontext() if latency_s is None else store(folder, latency_s):
                    told = measured(local if latency_s is None else remote, pair, alone)
                found.setdefault((side, alone), []).append(told)
                print(side, "alone" * alone, json.dumps(told), file=sys.stderr, flush=True)
            with store(folder, 0.05):
                cached = replace(remote, cache=_cache_of(remote.uri, Cache(dir=str(folder / f"cache{pair}{alone}"))))
                for side in ("50 ms, cache, epoch 1", "50 ms, cache, epoch 2"):
                    found.setdefault((side, alone), []).append(measured(cached, pair, alone))
    return report(found, local, args)


def report(found: dict[tuple[str, bool], list[dict[str, float]]], dataset: Dataset, args: argparse.Namespace) -> str:
    shards = dataset.manifest.shards
    size = sum(shard.size_bytes for shard in shards) / 1e6
    lines = [
        "# Reads from a bucket against a local disk",
        "",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), "
        "no GPU, other work on the machine.",
        f"{args.rows:,} JPEGs in {len(shards)} shards of {sum(len(s.row_groups) for s in shards)} row groups, "
        f"{size:.0f} MB; window 256 MB; {args.pairs} pairs, medians, ratios taken within a pair.",
        "The bucket is a server on loopback that waits before each answer; its CPU is on the same cores.",
        "",
        f"    python -m tests.reference.store_bench --pairs {args.pairs} --to docs/benchmarks/store_reads.md",
        "",
    ]
    for alone, what, unit in ((True, "The reader alone", "MB/s"), (False, "The whole feed", "images/s")):
        lines += [f"## {what}", ""]
        lines += [f"| side | {unit} | ratio to local | first, s | requests | s each | CPU of the process, cores |"]
        lines += ["|---|---|---|---|---|---|---|"]
        base = [told["rate"] for told in found["local disk", alone]]
        for (side, is_alone), told in found.items():
            if is_alone == alone:
                ratios = sorted(one["rate"] / other for one, other in zip(told, base, strict=True))
                middle = {name: statistics.median(one[name] for one in told) for name in told[0]}
                cells = [side, f"{middle['rate']:,.0f}"]
                cells += [f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"]
                cells += [f"{middle['first_s']:.2f}", f"{middle['gets']:.0f}", f"{middle['get_s']:.3f}"]
                lines.append(f"| {' | '.join([*cells, format(middle['cpu_share'], '.2f')])} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
