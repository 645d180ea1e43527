"""The same images in the format of each feed, made once below the data folder and kept."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.feeds.pictures import write_pictures
from tests.reference.feeds.work import Store, number_of

ROOT = Path(__file__).parents[3]
SHARD = 500
"""Images of a tar shard and of a Parquet file."""


def write_formats(data: Path, images: int, wanted: set[str], workers: int) -> None:
    """Write the formats that are not there yet; a format is there when its folder is."""
    writers: dict[str, Callable[[Path, Path, int], None]] = {
        "packed": _packed,
        "tar": _tar,
        "parquet": _parquet,
        "litdata": _litdata,
        "dataset": _dataset,
    }
    files = data / "files"
    _once(files, lambda folder: write_pictures(folder, images, 0, workers))
    found = len(_files(files))
    if found != images:
        raise SystemExit(f"{files} holds {found} images, --images says {images}: give another --data, or remove it")
    for form in sorted(wanted - {"files"}):
        _once(data / form, lambda folder, write=writers[form]: write(files, folder, workers))


def copy_to(store: Store, data: Path, wanted: set[str]) -> None:
    """The formats into the bucket of a store."""
    from pyarrow import fs

    keys = {"access_key": store.key, "secret_key": store.secret}
    bucket = fs.S3FileSystem(endpoint_override=store.endpoint, region="us-east-1", **keys)
    for form in sorted(wanted):
        for path in sorted((data / form).rglob("*")):
            if path.is_file():
                target = f"{store.bucket}/{path.relative_to(data)}"
                fs.copy_files(str(path), target, destination_filesystem=bucket)


def _once(folder: Path, write: Callable[[Path], None]) -> None:
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(folder)


def _files(files: Path) -> list[Path]:
    return sorted((files / "train").rglob("*.jpg"), key=lambda path: path.stem)


def _packed(files: Path, folder: Path, _: int) -> None:
    ends = [0]
    with (folder / "bytes.bin").open("wb") as out:
        for path in _files(files):
            ends.append(ends[-1] + out.write(path.read_bytes()))
    np.save(folder / "ends.npy", np.array(ends[1:], np.uint64))


def _tar(files: Path, folder: Path, _: int) -> None:
    for first, part in _shards(files):
        with tarfile.open(folder / f"{first:08d}.tar", "w") as shard:
            for path in part:
                data = path.read_bytes()
                member = tarfile.TarInfo(path.name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def _parquet(files: Path, folder: Path, _: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for first, part in _shards(files):
        images = pa.array([path.read_bytes() for path in part], pa.binary())
        table = pa.table({"image": images, "number": [number_of(path.name) for path in part]})
        parquet.write_table(table, folder / f"{first:08d}.parquet", compression="none", row_group_size=SHARD // 4)


def litdata_item(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "number": number_of(path)}


def _litdata(files: Path, folder: Path, workers: int) -> None:
    from litdata import optimize

    inputs = [str(path) for path in np.random.default_rng(0).permutation(np.array(_files(files), dtype=object))]
    optimize(litdata_item, inputs, str(folder), chunk_bytes="64MB", num_workers=workers, verbose=False)


def _dataset(files: Path, folder: Path, _: int) -> None:
    command = [sys.executable, "-m", "scalecv", "ingest", str(files), "--to", str(folder), "--layout", "imagefolder"]
    command += ["--concurrency", "0", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"RAY_ADDRESS": ""})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def _shards(files: Path) -> list[tuple[int, list[Path]]]:
    everything = _files(files)
    return [(first, everything[first : first + SHARD]) for first in range(0, len(everything), SHARD)]
