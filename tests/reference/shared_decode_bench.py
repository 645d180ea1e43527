"""Four trials at a time on one node, each decoding for itself against sharing what they decode.

    python -m tests.reference.shared_decode_bench [--pairs 2] [--to docs/benchmarks/shared_decode.md]

Each trial is a process that trains a tiny network with its own learning rate, as those of `scalecv tune` do, on
pictures that are slow to decode. Decoded images are counted where `batches` decodes them, in all processes.
Figures of one picture are CPU time of one thread.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tests.reference.bench import ROOT, cpu

TRIALS, SIDE, IMAGES = 4, 448, 480
KEYS = {
    "task": "classify", "model.arch": "resnet10", "model.stem": "small", "model.norm": "group", "data.size_px": 32,
    "data.augment.hflip": 0.5, "data.augment.rotate_deg": 10, "train.batch": 32, "train.threads": 1,
    "data.decode_threads": 1, "scale.workers": 0, "track.pictures": 0, "track.pictures_every": 0,
}  # fmt: skip


def photo(number: int, height: int = SIDE, width: int = SIDE) -> PIL.Image.Image:
    """Smooth colours with grain, which packs about as badly as a photograph."""
    rng = np.random.default_rng(number)
    small = PIL.Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((width, height), PIL.Image.BICUBIC)
    return PIL.Image.fromarray(np.clip(np.asarray(small) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype("u1"))


def dataset(folder: Path) -> Path:
    from scalecv.shards.ingest import IngestOptions, ingest

    for number in range(IMAGES):
        file = folder / "images" / f"class{number % 4}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(file)
    options = IngestOptions(source=str(folder / "images"), to=str(folder / "data"), layout="imagefolder", concurrency=0)
    ingest(options)
    return folder / "data"


def trial(told: dict[str, Any]) -> None:
    """One trial in this process, once a file says go; prints what it took."""
    from scalecv import config
    from scalecv.batches import collate, samples
    from scalecv.train.run import train

    decoded: list[int] = []
    by_wheels, by_c = samples.decoded, collate._cropped

    def counted(*given: Any) -> Any:
        decoded.append(1)
        return by_wheels(*given)

    def counted_by_c(*given: Any) -> Any:
        done = by_c(*given)
        decoded.append(len(done))
        return done

    samples.decoded, collate._cropped = counted, counted_by_c
    experiment = config.build(config.with_overrides({}, told["keys"]), "bench")
    print("ready", flush=True)
    sys.stdin.readline()
    began, busy = time.time(), time.process_time()
    result = train(experiment)
    took = {"began": began, "ended": time.time(), "cpu_s": time.process_time() - busy}
    print(json.dumps({**took, "decoded": sum(decoded), "weights": result.weights_hash}), flush=True)


def together(data: Path, folder: Path, pixels: str, trials: range, epochs: int) -> list[dict[str, Any]]:
    """What each of some trials took that trained at the same time."""
    started = []
    for number in trials:
        own = {"name": f"trial{number}", "seed": number % 2, "train.lr": 0.01 * (number + 1), "train.epochs": epochs}
        own |= {"data.uri": str(data), "cache.pixels": pixels, "cache.dir": str(folder / "cache")}
        own |= {"track.storage": str(folder / "runs"), "track.uri": f"sqlite:///{folder}/{number}.db"}
        command = [sys.executable, "-m", "tests.reference.shared_decode_bench", "--trial", json.dumps(KEYS | own)]
        started.append(
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    for one in started:
        assert one.stdout and one.stdout.readline() == b"ready\n", one.communicate()[1].decode()
    for one in started:
        assert one.stdin
        one.stdin.write(b"go\n")
        one.stdin.flush()
    said = [one.communicate() for one in started]
    if any(one.returncode for one in started):
        raise SystemExit("\n".join(error.decode() for _, error in said))
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def one_picture() -> dict[str, tuple[float, float]]:
    """Microseconds of CPU for a picture that is decoded, and for one that is taken, by kind."""
    import io

    import torch

    from scalecv.batches import transforms
    from scalecv.batches.collate import Row
    from scalecv.batches.pixels import Pixels
    from scalecv.batches.shared_pixels import SharedPixels
    from scalecv.batches.slots import Fixed, Layout
    from scalecv.cache import NodeCache
    from scalecv.config import Augment
    from scalecv.shards.decode import decode_pixels

    torch.set_num_threads(1)
    found = {}
    for name, kind, augment in (
        ("PNG 500 x 375, resized to 224", "PNG", Augment()),
        ("JPEG 500 x 375, resized to 224", "JPEG", Augment()),
        ("PNG 500 x 375, random crop to 224", "PNG", Augment(resized_crop=(0.08, 1.0))),
        ("JPEG 500 x 375, random crop to 224", "JPEG", Augment(resized_crop=(0.08, 1.0))),
    ):
        how = Pixels(
            bands=None, color="rgb", channels=3, dtype="uint8", source_dtype="uint8", size_px=224, resize="stretch",
            mean=(0.0,) * 3, std=(1.0,) * 3, classes=("a",), augment=augment,
        )  # fmt: skip
        rows = []
        for number in range(32):
            data = io.BytesIO()
            photo(number, 375, 500).save(data, kind, quality=90)
            rows.append(Row(str(number), "", "", data.getvalue(), None, None, "a", number=number))
        whole = augment.resized_crop is not None
        layout = Layout((375, 500, 3) if whole else (224, 224, 3), "uint8", None)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
            cache = NodeCache(folder, 1 << 30)
            handle = cache.slots("0" * 64, layout.slot_bytes, len(rows))
            assert handle is not None
            kept = SharedPixels(cache, handle, len(rows), layout, whole=whole)
            for row in rows:
                pixels = torch.from_numpy(decode_pixels(row.image).copy()).permute(2, 0, 1)
                kept.write(row.number or 0, Fixed(pixels if whole else transforms.scaled(pixels, 224)))
            sides = decode_here(rows, how), take_here(rows, how, kept)
            found[name] = tuple(pool.submit(cpu_us, side).result() for side in sides)
            kept.close()
    return found


def decode_here(rows: list[Any], how: Any) -> Callable[[], None]:
    """Decode some rows in the thread that calls it."""
    from scalecv.batches import collate, samples, transforms
    from scalecv.batches.memory import BatchMemory, Blocks

    def decode() -> None:
        memory = BatchMemory(len(rows), how, Blocks(0))
        chances = {at: transforms.draws(0, 0, row.id) for at, row in enumerate(rows)}
        done = collate._cropped(rows, how, chances, memory)
        for at in chances.keys() - done:
            row = rows[at]
            memory.put(at, samples.sample(row.image, None, None, how, chances[at], memory.at(at))[0])

    return decode


def take_here(rows: list[Any], how: Any, kept: Any) -> Callable[[], None]:
    """Take some rows from the share in the thread that calls it."""
    import torch

    from scalecv.batches import samples, transforms

    out = torch.empty(kept.layout.shape, dtype=torch.uint8).permute(2, 0, 1)
    place = torch.empty((224, 224, 3), dtype=torch.uint8).permute(2, 0, 1)

    def take() -> None:
        for row in rows:
            u = transforms.draws(0, 0, row.id)
            samples.varied(kept.read(row.number, out), how, u, None, place)

    return take


def cpu_us(work: Callable[[], None], rows: int = 32, times: int = 7) -> float:
    """Median microseconds of this thread's CPU for each row."""
    work()
    taken = []
    for _ in range(times):
        began = time.thread_time()
        work()
        taken.append((time.thread_time() - began) / rows * 1e6)
    return statistics.median(taken)


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--trial")
    ask.add_argument("--pairs", type=int, default=2)
    ask.add_argument("--epochs", type=int, default=3)
    ask.add_argument("--to", type=Path)
    args = ask.parse_args()
    if args.trial:
        trial({"keys": json.loads(args.trial)})
        return
    with tempfile.TemporaryDirectory(prefix="scalecv-shared-") as name:
        top = Path(name)
        data = dataset(top)
        rows = []
        for pair in range(args.pairs):
            sides = {}
            for pixels in ("no", "yes") if pair % 2 == 0 else ("yes", "no"):
                sides[pixels] = together(data, top / f"{pair}-{pixels}", pixels, range(TRIALS), args.epochs)
            rows.append(sides)
            print(json.dumps({key: summary(side) for key, side in sides.items()}), file=sys.stderr, flush=True)
        alone = together(data, top / "alone", "no", range(1), args.epochs)
    text = report(args, rows, alone, one_picture())
    print(text)
    if args.to:
        args.to.write_text(text)


def summary(side: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Seconds until the last one ended, seconds of CPU of all, images decoded by all."""
    wall = max(one["ended"] for one in side) - min(one["began"] for one in side)
    return wall, sum(one["cpu_s"] for one in side), sum(one["decoded"] for one in side)


def report(
    args: argparse.Namespace,
    rows: list[dict[str, list[dict[str, Any]]]],
    alone: list[dict[str, Any]],
    pictures: dict[str, tuple[float, float]],
) -> str:
    def line(what: str, at: int, form: str) -> str:
        values = {key: [summary(row[key])[at] for row in rows] for key in ("no", "yes")}
        ratio = statistics.median(b / a for a, b in zip(values["no"], values["yes"], strict=True))
        told = [", ".join(format(value, form) for value in values[key]) for key in ("no", "yes")]
        return f"| {what} | {told[0]} | {told[1]} | {ratio:.2f} |"

    equal = all([a["weights"] for a in row["no"]] == [b["weights"] for b in row["yes"]] for row in rows)
    equal = equal and alone[0]["weights"] == rows[0]["yes"][0]["weights"]
    same = "the same, bit for bit" if equal else "NOT THE SAME"
    kinds = "\n".join(f"| {kind} | {a:,.0f} | {b:,.0f} |" for kind, (a, b) in pictures.items())
    most = max(summary(row["yes"])[2] for row in rows)
    return f"""# Decoded images shared by the trials of a node

{datetime.datetime.now(datetime.UTC).date()}, {cpu()}, no GPU, load {os.getloadavg()[0]:.0f} while it ran.
{TRIALS} trials at the same time, each a process with one thread for the network and one for decoding;
{args.epochs} epochs of {IMAGES} PNGs (train, val and test) of {SIDE} x {SIDE} pixels, resized to 32;
two seeds, {TRIALS} learning rates.

    python -m tests.reference.shared_decode_bench --pairs {args.pairs} --epochs {args.epochs}

| {TRIALS} trials together | each decodes for itself | `cache.pixels=yes` | ratio |
|---|---|---|---|
{line("images decoded, all processes", 2, ",")}
{line("wall time, s", 0, ".1f")}
{line("CPU of all, s", 1, ".1f")}

From an empty cache on, the share decodes {most:,} images, {most / IMAGES:.2f} times those of one epoch ({IMAGES});
one trial alone decodes {alone[0]["decoded"]:,}. The weights of each trial are {same},
with the share, without it, and (trial 0) alone.

## One picture

Microseconds of CPU of one thread, augmentation included, from the page cache.

| picture | decoded | taken from the share |
|---|---|---|
{kinds}
"""


if __name__ == "__main__":
    main()
