"""One chunk of a prediction: its images through the model, what comes out into storage, and a record written last.

Runs in the caller's process or in a Ray actor. A chunk that was cut off leaves no record and may run again anywhere.
"""

import hashlib
import io
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalecv import raster, storage
from scalecv.artifacts.bundle import open_bundle
from scalecv.raster import PIXELS, Profile
from scalecv.serve.predictor import Predictor, Read, Rows
from scalecv.shards import store
from scalecv.shards.decode import TIFF, BadImage, decode_image, decode_pixels
from scalecv.shards.scene import SceneReader
from scalecv.tiles import Window

RECORDS = "_predict"
"""Folder below the target for the records of chunks and what was set aside; readers of Parquet pass it by."""
CHUNK_ROWS = 256
"""Images whose pixels are held at once."""


@dataclass(frozen=True)
class Job:
    """What a prediction is asked to do; the same for all of its chunks."""

    bundle: str
    source: str
    version: int | None
    """Of a dataset; None for files."""
    to: str
    batch: int | None
    tile: int | None
    overlap: int | None
    probability: str | None
    allow_import: bool


@dataclass(frozen=True)
class _Image:
    """One image of a chunk."""

    path: str
    id: str | None
    split: str | None
    profile: Profile
    read: Read
    is_raster: bool


class Worker:
    """A model that does chunks, one after the other."""

    def __init__(self, job: Job, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._job = job
        self._reader = SceneReader()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bundle = open_bundle(job.bundle, allow_import=job.allow_import)
        self._predictor = Predictor(bundle, device, job.batch, job.tile, job.overlap)

    def close(self) -> None:
        """End the child that decodes."""
        self._reader.close()

    def __call__(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        """Do one chunk: its record, {name, rows, outputs: [[path, size]], quarantine: [...]}."""
        aside: list[dict[str, Any]] = []
        images = self._images(chunk, aside)
        if self._predictor.task.name == "classify":
            rows, outputs = self._classify(chunk["name"], images, aside)
        else:
            rows, outputs = self._segment(images, aside)
        record = {"name": chunk["name"], "rows": rows, "outputs": outputs, "quarantine": aside}
        text = json.dumps(record, sort_keys=True).encode()
        storage.put(storage.join(self._job.to, RECORDS, chunk["name"] + ".json"), text)
        return record

    def _images(self, chunk: Mapping[str, Any], aside: list[dict[str, Any]]) -> Iterator[_Image]:
        if "group" in chunk:
            yield from self._dataset_images(chunk)
            return
        for path, size_bytes, _ in chunk["files"]:
            uri = storage.join(self._job.source, path) if path else self._job.source
            name = path or uri.rpartition("/")[2]
            try:
                profile = self._reader.open(uri, size_bytes)
                self._predictor.check(profile)
            except BadImage as error:
                aside.append(_aside(name, error))
                continue
            yield _Image(name, None, None, profile, self._reader.read, self._reader.is_raster)

    def _dataset_images(self, chunk: Mapping[str, Any]) -> Iterator[_Image]:
        dataset = store.open_dataset(self._job.source, self._job.version)
        shard = dataset.manifest.shards[chunk["shard"]]
        table = store.read_row_group(dataset.uri, shard, chunk["group"], cache=dataset.cache)
        for row in table.select(["id", "image", "nodata"]).to_pylist():
            data, path = row["image"]["bytes"], row["image"]["path"]
            is_raster = data.startswith(TIFF)
            image = decode_image(data) if is_raster else None  # known good by its hash
            pixels = image.pixels if image else decode_pixels(data)
            height, width, bands = pixels.shape
            plain = Profile(width, height, bands, pixels.dtype.name, row["nodata"], None, PIXELS)
            profile = image.place if image and image.place else plain
            self._predictor.check(profile)
            yield _Image(path, row["id"], shard.split, profile, _reads(pixels), is_raster)

    def _classify(
        self, name: str, images: Iterator[_Image], aside: list[dict[str, Any]]
    ) -> tuple[int, list[tuple[str, int]]]:
        pictures, known = [], []
        for image in images:
            try:
                pixels = image.read(Window(0, 0, image.profile.height, image.profile.width))
            except BadImage as error:
                aside.append(_aside(image.path, error))
                continue
            pictures.append(self._predictor.picture(pixels, image.profile.nodata))
            known.append(image)
        found = list(self._predictor.classify(pictures))
        if not found:
            return 0, []
        data = _table(known, found, self._predictor.facts.classes, self._job.probability)
        path = f"predictions-{name[:16]}.parquet"
        storage.put(storage.join(self._job.to, path), data)
        return len(found), [(path, len(data))]

    def _segment(self, images: Iterator[_Image], aside: list[dict[str, Any]]) -> tuple[int, list[tuple[str, int]]]:
        rows, outputs = 0, []
        for image in images:
            try:
                with tempfile.TemporaryDirectory(prefix="scalecv-") as folder:
                    for local, path in self._draw(image, Path(folder)):
                        outputs.append((path, _put_file(storage.join(self._job.to, path), local)))
                rows += 1
            except BadImage as error:
                aside.append(_aside(image.path, error))
        return rows, outputs

    def _draw(self, image: _Image, folder: Path) -> list[tuple[Path, str]]:
        """The files of one image, on local disk, with their names below the target."""
        facts, how = self._predictor.facts, self._job.probability
        values = np.array(facts.pixels.mask_values or range(len(facts.classes)))
        nodata = _nodata(facts.pixels.mask_ignore, values)
        kind = np.result_type(*(np.min_scalar_type(int(one)) for one in (values.min(), values.max(), nodata)))
        rows = self._predictor.segment(image.profile, image.read)
        tags = {"classes": json.dumps(dict(zip(values.tolist(), facts.classes, strict=True)))}
        if not image.is_raster and how is None and kind.kind == "u":
            whole = np.concatenate([_classes(some, values, nodata, kind)[0] for some in rows])
            local = folder / "classes.png"
            local.write_bytes(_png(whole))
            return [(local, _named(image.path, "png"))]
        bands = 1 if len(facts.classes) == 2 else len(facts.classes)
        places = [_Place(image.profile, folder / "classes.tif", 1, str(kind), nodata, tags)]
        if how is not None:
            gone, dtype = (float("nan"), "float32") if how == "float32" else (255, "uint8")
            places.append(_Place(image.profile, folder / "probability.tif", bands, dtype, gone, tags))
        _write(places, ([_classes(r, values, nodata, kind), *_shares(r, bands, how)] for r in rows))
        names = [_named(image.path, "tif"), _named(image.path, "tif")[:-4] + ".probability.tif"]
        return [(place.cog(), name) for place, name in zip(places, names, strict=False)]


@dataclass(frozen=True)
class _Place:
    """A raster that is being written, where the image lies."""

    profile: Profile
    path: Path
    bands: int
    dtype: str
    nodata: float
    tags: Mapping[str, str]

    def create(self) -> Any:
        """See `raster.create`."""
        p = self.profile
        size = (p.width, p.height)
        return raster.create(str(self.path), size, self.bands, self.dtype, self.nodata, p.wkt, p.transform, self.tags)

    def cog(self) -> Path:
        """The finished raster as a Cloud-Optimized one."""
        done = self.path.with_suffix(".cog.tif")
        raster.to_cog(str(self.path), str(done), is_classes="classes" in self.path.name)
        self.path.unlink()
        return done


def _write(places: Sequence[_Place], parts: Iterator[list[NDArray[Any]]]) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        writers = [stack.enter_context(place.create()) for place in places]
        top = 0
        for part in parts:
            for write, rows in zip(writers, part, strict=True):
                write(top, rows)
            top += part[0].shape[1]


def _classes(rows: Rows, values: NDArray[Any], nodata: int, kind: "np.dtype[Any]") -> NDArray[Any]:
    """[1, n, W] of the numbers that masks use, `nodata` where the image has none."""
    return np.where(rows.missing, nodata, values[rows.classes]).astype(kind)[None]


def _shares(rows: Rows, bands: int, how: str | None) -> list[NDArray[Any]]:
    """[K, n, W] of probabilities (of the foreground alone where there are two classes), if they are asked for."""
    if how is None:
        return []
    shares = rows.probability[-bands:]
    if how == "float32":
        return [np.where(rows.missing, np.float32("nan"), shares)]
    return [np.where(rows.missing, 255, np.rint(shares * 254)).astype(np.uint8)]


def _nodata(ignore: int | None, values: NDArray[Any]) -> int:
    """A number that is no class: what masks ignore, else 255 or 65535."""
    known = set(values.tolist())
    return next(number for number in (ignore, 255, 65535, 1 << 31) if number is not None and number not in known)


def _named(path: str, ending: str) -> str:
    """Path of a prediction: that of the image, with the ending added where it is another one."""
    path = path.replace("#", "@")
    return path if path.lower().endswith("." + ending) else f"{path}.{ending}"


def _png(values: NDArray[Any]) -> bytes:
    import PIL.Image

    out = io.BytesIO()
    PIL.Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def _put_file(uri: str, path: Path) -> int:
    """Write a local file to storage without holding it in memory; its size."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        with memoryview(held) as view:
            storage.put(uri, view)
    return os.path.getsize(path)


def _reads(pixels: NDArray[Any]) -> Read:
    return lambda w: pixels[w.row : w.row + w.height, w.col : w.col + w.width]


def _aside(path: str, error: BadImage) -> dict[str, Any]:
    return {"path": path, "stage": "decode", "reason": error.reason, "detail": error.detail}


def _table(
    images: Sequence[_Image],
    found: Sequence[tuple[int, NDArray[np.float32]]],
    classes: Sequence[str],
    probability: str | None,
) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "id": pa.array([image.id for image in images], pa.string()),
        "path": [image.path for image in images],
        "split": pa.array([image.split for image in images], pa.string()),
        "class": [classes[number] for number, _ in found],
        "probability": pa.array([float(shares[number]) for number, shares in found], pa.float32()),
    }
    if probability is not None:
        columns["probabilities"] = pa.array([shares.tolist() for _, shares in found], pa.list_(pa.float32()))
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def chunk_name(job_key: str, content: Any) -> str:
    """SHA-256 of what a chunk is, so that the same work has the same name."""
    return hashlib.sha256(json.dumps([job_key, content]).encode()).hexdigest()
