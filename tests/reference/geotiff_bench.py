"""Tiles of four bands with masks, both GeoTIFFs with a CRS, to shuffled uint8 batches: scalecv beside a DataLoader.

    python -m tests.reference.geotiff_bench [--tiles 3000] [--rounds 3] [--epsg 3826 32633]

Sides, in turns, each in a fresh process, two epochs of which the second counts; CPU time is that of the whole tree of
processes:
    feed     scalecv's feed with two decoding threads, from shards
    loader   torch DataLoader with two workers, rasterio.open(path).read() for image and mask, flips: the plain way
    bare     two processes that read files without asking where they lie, and make no batches
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.bench import cpu
from tests.reference.feeds import processes

SIDES = ("feed", "loader", "bare")
SIDE, BATCH, WORKERS = 256, 32, 2


def tiles(folder: Path, count: int, epsg: int) -> None:
    """Write tiles as aerial surveys do: LZW in blocks of 128 px, bands pixel by pixel."""
    import rasterio
    from PIL import Image

    rng = np.random.default_rng(0)
    shape = {"driver": "GTiff", "width": SIDE, "height": SIDE, "dtype": "uint8", "crs": f"EPSG:{epsg}"}
    blocks = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "lzw", "interleave": "pixel"}
    for number in range(count):
        bands = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (24, 24), np.uint8)).resize((SIDE, SIDE))) for _ in "rgbn"
        ]
        image = np.clip(np.stack(bands) + rng.normal(0, 3, (4, SIDE, SIDE)), 0, 255).astype(np.uint8)
        place = rasterio.Affine(0.5, 0, 300_000 + 128 * (number % 100), 0, -0.5, 2_700_000 - 128 * (number // 100))
        for kind, data in (("images", image), ("masks", (image[:1] > 150).astype(np.uint8))):
            path = folder / "train" / kind / f"{number:05d}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(path, "w", count=len(data), transform=place, **shape, **blocks) as target:
                target.write(data)


def feed(folder: Path) -> Iterator[Iterator[int]]:
    from scalecv.batches.feed import Feed
    from scalecv.batches.pixels import pixels_of
    from scalecv.config import Augment, Data
    from scalecv.shards.store import open_dataset

    uri = str(folder / "data")
    dataset = open_dataset(uri)
    how = Data(uri=uri, augment=Augment(hflip=0.5, vflip=0.5))
    made = Feed(
        dataset, "train", pixels_of(dataset.manifest, how, uri), BATCH, seed=0, is_training=True, threads=WORKERS
    )
    with made.epochs(0, 0, 2) as batches:
        for _ in range(2):
            yield (_counted(batch["image"], batch["mask"], int(batch["valid"].sum())) for _, batch in next(batches))


def _counted(image: Any, mask: Any, rows: int) -> int:
    assert image.shape[1:] == (4, SIDE, SIDE) and mask.shape[-2:] == (SIDE, SIDE), (image.shape, mask.shape)
    assert "uint8" in str(image.dtype), image.dtype
    return rows


class Files:
    """A map-style dataset of torch."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "train" / "images").glob("*.tif"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        import rasterio
        import torch

        path = self.paths[index]
        found = []
        axes = [axis for axis, draw in ((-1, torch.rand(())), (-2, torch.rand(()))) if draw < 0.5]
        for file in (path, path.parents[1] / "masks" / path.name):
            with rasterio.open(file) as source:
                found.append(torch.from_numpy(source.read()).flip(axes))
        return found[0], found[1][0]


def loader(folder: Path) -> Iterator[Iterator[int]]:
    from torch.utils.data import DataLoader

    made = DataLoader(Files(folder), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    for _ in range(2):
        yield (_counted(image, mask, len(image)) for image, mask in made)


def _read(paths: list[Path]) -> int:
    from scalecv import raster

    for path in paths:
        for file in (path, path.parents[1] / "masks" / path.name):
            raster.read(file.read_bytes())
    return len(paths)


def bare(folder: Path) -> Iterator[Iterator[int]]:
    paths = Files(folder).paths
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        for _ in range(2):
            yield pool.imap_unordered(_read, [paths[at : at + BATCH] for at in range(0, len(paths), BATCH)])


def one(name: str, folder: Path) -> None:
    """One side in this process: tiles a second, and a CPU-second, of the second epoch."""
    for epoch in {"feed": feed, "loader": loader, "bare": bare}[name](folder):
        used, began = processes.cpu_s(os.getpid()), time.perf_counter()
        rows = sum(epoch)
        wall_s, cpu_s = time.perf_counter() - began, processes.cpu_s(os.getpid()) - used
    print(json.dumps({"rows": rows, "wall": rows / wall_s, "cpu": rows / cpu_s}), flush=True)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--tiles", type=int, default=3000)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--epsg", type=int, nargs="+", default=[3826, 32633])
    ask.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.one:
        one(asked.one[0], Path(asked.one[1]))
        return
    print(f"{time.strftime('%Y-%m-%d')}, {cpu()}; {asked.tiles} tiles, medians of {asked.rounds} rounds\n")
    print("| CRS | side | tiles/s | tiles per CPU-second | of the DataLoader (range) |\n|---|---|---|---|---|")
    for epsg in asked.epsg:
        with tempfile.TemporaryDirectory(prefix="geotiff-bench-") as name:
            _compare(Path(name), asked.tiles, epsg, asked.rounds)


def _compare(folder: Path, count: int, epsg: int, rounds: int) -> None:
    from scalecv.shards.ingest import IngestOptions, ingest

    tiles(folder, count, epsg)
    ingest(IngestOptions(source=str(folder), to=str(folder / "data"), layout="masks", split="100/0", concurrency=0))
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, "-m", "tests.reference.geotiff_bench", "--one", side, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            told = json.loads(done.stdout.splitlines()[-1])
            if told["rows"] != count:
                raise SystemExit(f"{side}: {told['rows']} of {count} tiles came")
            found[side].append(told)
    for side in SIDES:
        wall, used = (statistics.median(row[key] for row in found[side]) for key in ("wall", "cpu"))
        ratios = [a["cpu"] / b["cpu"] for a, b in zip(found[side], found["loader"], strict=True)]
        span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| EPSG:{epsg} | {side} | {wall:,.0f} | {used:,.0f} | {span} |", flush=True)


if __name__ == "__main__":
    main()
