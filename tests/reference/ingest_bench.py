"""What `scalecv ingest` costs beside a bare loop that reads, checks by full decode, and hashes.

    python -m tests.reference.ingest_bench [--photos 5000] [--small 5000] [--pairs 3] [--to docs/benchmarks/ingest.md]

Images made by code, on local disk. Loop and ingest take turns, each in a fresh process, and CPU time is counted over
the whole process tree. Each runs over few images and over all: the difference is what one further image costs, the
start (imports, the child that decodes) what is left. Then: memory over --many images, and a real S3 server behind a
proxy that answers 50 ms late.
"""

import argparse
import datetime
import hashlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from tests.reference.bench import cpu

FEW = 500
LATENCY_S = 0.05
KINDS = {
    "photo": "JPEG, 400x300 px",
    "jpg": "JPEG, 32x32 px",
    "png": "PNG, 32x32 px",
}


def make(folder: Path, count: int, kind: str) -> float:
    """Write images in ten class folders; their mean size in bytes."""
    scenes = [_scene(seed) for seed in range(24)]
    size = 0
    for number in range(count):
        scene, shift = scenes[number % 24], number // 24
        x, y = shift % 40, shift // 40 % 30
        if kind != "photo":
            x, y = (shift * 7) % 400, (shift // 57 * 5) % 290
        width, height = (400, 300) if kind == "photo" else (32, 32)
        out = io.BytesIO()
        scene.crop((x, y, x + width, y + height)).save(out, "PNG" if kind == "png" else "JPEG", quality=88)
        path = folder / f"class{number % 10}" / f"{number:06d}.{'png' if kind == 'png' else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
        size += out.tell()
    return size / count


def _scene(seed: int) -> PIL.Image.Image:
    """A picture of 440x330 px with structure at all scales."""
    rng = np.random.default_rng(seed)
    pixels = np.full((330, 440, 3), 128.0)
    for cells, strength in ((4, 45), (16, 22), (64, 12), (220, 7)):
        noise = rng.normal(0, strength, (max(2, cells * 3 // 4), cells, 3)).astype(np.float32)
        layers = [PIL.Image.fromarray(noise[..., band]).resize((440, 330)) for band in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    return PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def loop(folder: Path, decoder: str) -> int:
    """Read, decode in full, hash; the number of images."""
    from scalecv.jpeg import turbo

    count = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(where, name), "rb") as file:
                data = file.read()
            known = turbo.header(data) if decoder == "libjpeg-turbo" else None
            if known is None:
                PIL.Image.open(io.BytesIO(data)).load()
            else:
                assert turbo.decode(data, known) is not None
            hashlib.sha256(data).hexdigest()
            count += 1
    return count


def one(what: str, folder: str, to: str) -> None:
    """Run one side in this process and print what it took."""
    from scalecv.shards.ingest import IngestOptions, ingest

    began, before = time.perf_counter(), os.times()
    if what == "ingest":
        count = ingest(IngestOptions(source=folder, to=to, layout="imagefolder", concurrency=0)).rows
    else:
        count = loop(Path(folder), what)
    after = os.times()
    used = sum(after[:4]) - sum(before[:4])
    print(json.dumps({"images": count, "wall_s": time.perf_counter() - began, "cpu_s": used}))


def run(what: str, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as to:
        command = [sys.executable, "-m", "tests.reference.ingest_bench", "--one", what, str(folder), f"{to}/data"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def compare(folder: Path, few: Path, sides: Sequence[str], pairs: int) -> dict[str, tuple[float, float, float]]:
    """Side -> microseconds of CPU and of the clock for one further image, CPU seconds of the start; medians."""
    taken: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(pairs):
        for side in sides:
            start, whole = run(side, few), run(side, folder)
            images = whole["images"] - start["images"]
            per_image = [(whole[key] - start[key]) / images for key in ("cpu_s", "wall_s")]
            fixed = start["cpu_s"] - per_image[0] * start["images"]
            taken[side].append((1e6 * per_image[0], 1e6 * per_image[1], fixed))
        print({side: taken[side][-1] for side in sides}, file=sys.stderr, flush=True)
    return {side: tuple(map(statistics.median, zip(*runs, strict=True))) for side, runs in taken.items()}  # type: ignore[misc]  # three


def memory(folder: Path, concurrency: int | None) -> dict[str, float]:
    """Peak RSS in MB of the driver and of each kind of process below it, and seconds, of one ingest."""
    import psutil

    script = (
        "import sys; from scalecv.shards.ingest import IngestOptions, ingest\n"
        "if __name__ == '__main__':\n"
        "    ingest(IngestOptions(source=sys.argv[1], to=sys.argv[2], layout='imagefolder', "
        f"concurrency={concurrency}))"
    )
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as to:
        began = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-c", script, str(folder), f"{to}/data"], env=_environment())
        while child.poll() is None:
            try:
                top = psutil.Process(child.pid)
                for process in (top, *top.children(recursive=True)):
                    name = "driver" if process.pid == child.pid else _role(process)
                    peaks[name] = max(peaks.get(name, 0.0), process.memory_info().rss / 1e6)
            except psutil.Error:
                pass
            time.sleep(0.2)
        if child.returncode:
            raise SystemExit(f"the ingest ended with {child.returncode}")
        return peaks | {"s": time.perf_counter() - began}


def _role(process: object) -> str:
    words = " ".join(process.cmdline())  # type: ignore[attr-defined]  # psutil is untyped
    return "decoder" if "examiner" in words else "worker" if words.startswith("ray::") else "other"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def late(folder: Path, few: Path, server_folder: Path) -> dict[int, float]:
    """Reads at a time -> images per second of an ingest from a store that answers 50 ms late."""
    from scalecv import storage
    from scalecv.shards import unit
    from scalecv.shards.ingest import IngestOptions, ingest
    from scalecv.testing.servers import S3Server
    from scalecv.testing.store_proxy import Faults, StoreProxy

    server = S3Server(server_folder)
    server.start()
    rates = {}
    try:
        os.environ.update(server.environment)
        bucket = server.bucket()
        for place, source in (("late", folder), ("few", few)):
            for path in source.rglob("*.*"):
                storage.put(f"{bucket}/{place}/{path.relative_to(source)}", path.read_bytes())
        with StoreProxy(server.endpoint, Faults(latency_s=LATENCY_S)) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            for fetches, place in ((unit._FETCHES, "few"), (1, "few"), (unit._FETCHES, "late")):
                usual, unit._FETCHES = unit._FETCHES, fetches
                options = IngestOptions(
                    source=f"{bucket}/{place}",
                    to=f"{server_folder}/to-{place}-{fetches}-{len(rates)}",
                    layout="imagefolder",
                    concurrency=0,
                )
                rates[fetches] = ingest(options).images_per_s
                unit._FETCHES = usual
    finally:
        server.kill()
    return rates


def main() -> None:
    """Measure and write the report."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--photos", type=int, default=5000)
    ask.add_argument("--small", type=int, default=10_000)
    ask.add_argument("--many", type=int, default=100_000)
    ask.add_argument("--pairs", type=int, default=3)
    ask.add_argument("--parts", nargs="+", default=["cpu", "memory", "late"])
    ask.add_argument("--to", type=Path)
    ask.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.one:
        one(*asked.one)
        return
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ingest-bench-") as name:
        top = Path(name)
        if "cpu" in asked.parts:
            lines += _cpu_lines(top, asked.photos, asked.small, asked.pairs)
        if "memory" in asked.parts:
            lines += _memory_lines(top, asked.many)
        if "late" in asked.parts:
            make(top / "late", 2000, "jpg")
            make(top / "late-few", 60, "jpg")
            rates = late(top / "late", top / "late-few", top / "s3")
            slow, fast = rates[1], max(rates.values())
            lines += [
                "## A source that answers 50 ms late",
                "",
                "A real S3 server behind a proxy; the same ingest with one read at a time and with its own number.",
                "",
                f"| one at a time | {max(rates)} at a time | ratio |",
                "|---|---|---|",
                f"| {slow:.1f} images/s | {fast:.0f} images/s | {fast / slow:.1f} |",
                "",
            ]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = [
        "# Ingest against the speed of the source",
        "",
        f"`{' '.join(['python -m tests.reference.ingest_bench', *sys.argv[1:]])}` on {today}, {cpu()}, "
        f"Python {platform.python_version()}.",
        "",
    ]
    text = "\n".join(head + lines)
    print(text)
    if asked.to:
        asked.to.write_text(text)


def _cpu_lines(top: Path, photos: int, small: int, pairs: int) -> list[str]:
    lines = [
        "## CPU of one further image",
        "",
        f"Microseconds over the whole process tree, medians of {pairs} pairs; the bare loop reads, decodes in full "
        "with the decoder that the ingest takes (libjpeg-turbo for JPEG, else Pillow) or with Pillow, and hashes. "
        "Beyond it the ingest lists, plans, takes statistics, writes Parquet, and hashes shard and row groups.",
        "",
        "| images | bytes | bare loop | bare loop, Pillow | ingest | loop / ingest | Pillow loop / ingest | start, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, what in KINDS.items():
        count = photos if kind == "photo" else small
        size = make(top / kind, count, kind)
        make(top / f"{kind}-few", FEW, kind)
        found = compare(top / kind, top / f"{kind}-few", ("libjpeg-turbo", "pillow", "ingest"), pairs)
        same, pillow, ours = (found[side][0] for side in ("libjpeg-turbo", "pillow", "ingest"))
        lines.append(
            f"| {count:,} {what} | {size:,.0f} | {same:.0f} | {pillow:.0f} | {ours:.0f} | {same / ours:.2f} "
            f"| {pillow / ours:.2f} | {found['ingest'][2]:.1f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
        for used in (top / kind, top / f"{kind}-few"):
            shutil.rmtree(used)
    return [*lines, ""]


def _memory_lines(top: Path, many: int) -> list[str]:
    lines = [
        "## Memory",
        "",
        "Peak RSS in MB of single processes, JPEG of 32x32 px, in one process and its decoder (`--concurrency 0`).",
        "",
        "| images | driver | decoder | s |",
        "|---|---|---|---|",
    ]
    for count in (many // 10, many):
        writers = [
            threading.Thread(target=make, args=(top / f"many-{count}" / str(part), count // 2, "jpg"))
            for part in range(2)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        peaks = memory(top / f"many-{count}", 0)
        lines.append(f"| {count:,} | {peaks['driver']:.0f} | {peaks.get('decoder', 0):.0f} | {peaks['s']:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
        shutil.rmtree(top / f"many-{count}")
    return [*lines, ""]


if __name__ == "__main__":
    main()
