"""Encoded rows -> one batch of pixels, and the batch -> normalised tensors on the device.

Pixels stay in the dtype of the files until they are on the device; that is a quarter of the bytes of
float32, and normalising there costs next to nothing.
"""

import math
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from scalecv.batches import crops, transforms
from scalecv.batches.pixels import Pixels
from scalecv.batches.shared_pixels import SharedPixels
from scalecv.batches.slots import Fixed
from scalecv.config import Augment
from scalecv.errors import DataError, IntegrityError
from scalecv.schema import IGNORE, Batch
from scalecv.shards import decode, jpeg


def sample(
    image: bytes,
    mask: bytes | None,
    nodata: float | None,
    how: Pixels,
    u: np.ndarray | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One row as pixels.

    Args:
        image, mask: encoded bytes.
        nodata: value of pixels without data; they become 0 after normalisation and count nowhere in the mask.
        how: bands, size and augmentation; with `marks_data` the mask says where the image has data.
        u: draws of the sample; None does not augment.
        out: [C, size_px, size_px] in how.dtype, where the image may be written.
    Returns: image [C, H, W] in how.dtype (memory order H, W, C), mask int64 [H, W] with class numbers or None. The
        image may lie in memory of this thread, which its next call writes over.
    """
    crop = how.augment.resized_crop if u is not None and how.size_px else None
    array, box = _decoded(image, crop if mask is None else None, u)
    return _varied(_fixed(array, mask, nodata, how, out, resizes=crop is None), how, u, box, out)


def _fixed(
    array: np.ndarray, mask: bytes | None, nodata: float | None, how: Pixels, out: torch.Tensor | None, *, resizes: bool
) -> Fixed:
    """All of a row's way that is the same each time, from its pixels [H, W, C] on."""
    target = None if mask is None or how.marks_data else torch.from_numpy(_classes(decode.decode_mask(mask), how))
    picture, gone = image_of(array, nodata, how)
    missing = None if gone is None else torch.from_numpy(gone)
    if how.marks_data:
        target = torch.zeros(array.shape[:2], dtype=torch.int64)
    if target is not None and missing is not None:
        target[missing] = IGNORE
    if not (how.size_px and resizes):
        return Fixed(picture, target, missing)
    planes = transforms.with_missing(target, missing)
    picture, planes = transforms.resize(picture, planes, how.size_px, how.resize, out)
    has = {"has_mask": target is not None, "has_missing": missing is not None}
    return Fixed(picture, *transforms.without_missing(planes, **has))


def _varied(
    row: Fixed, how: Pixels, u: np.ndarray | None, box: transforms.Box | None, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the draws make of a row; `box` is its crop, where that is known."""
    if u is None:
        return row.image, row.target
    missing = row.missing if how.augment.changes_values else None
    planes = transforms.with_missing(row.target, missing)
    picture, planes = transforms.move(row.image, planes, how.augment, u, how.size_px, box, out)
    has = {"has_mask": row.target is not None, "has_missing": missing is not None}
    target, gone = transforms.without_missing(planes, **has)
    return transforms.recolour(picture, how.augment, u, how.mean, how.std, gone), target


def _decoded(
    image: bytes, share: tuple[float, float] | None, u: np.ndarray | None
) -> tuple[np.ndarray, transforms.Box | None]:
    """The pixels [H, W, C] of an image, and the box that a crop will take of them; rows below it may be left out."""
    known = jpeg.header(image)
    if known is None:
        return decode.decode_pixels(image), None
    if share is None or u is None:
        box, rows = None, None
    else:
        box = transforms.crop_box(known.height, known.width, share, u)
        rows = box[0] + box[2]
    size_bytes = known.height * known.width * known.channels
    pixels = jpeg.decode(image, known, rows, _own_memory(size_bytes) if size_bytes <= LARGEST_KEPT else None)
    return decode.decode_pixels(image) if pixels is None else pixels, box


_THREAD = threading.local()
LARGEST_KEPT = 16 << 20


def _own_memory(size_bytes: int) -> np.ndarray:
    """Memory of this thread for one picture, which is in the batch before the next one comes; it stays in the cache."""
    kept: np.ndarray | None = getattr(_THREAD, "memory", None)
    if kept is None or kept.size < size_bytes:
        kept = _THREAD.memory = np.empty(size_bytes, np.uint8)
    return kept


def _channels(array: np.ndarray, nodata: float | None, how: Pixels) -> tuple[np.ndarray, np.ndarray | None]:
    """The wanted channels in the wanted dtype, and where pixels are missing (bool [H, W] or None)."""
    missing = _missing(array, nodata)
    if missing is not None:
        array = np.where(missing[..., None], np.zeros((), array.dtype), array)
    if how.color != "native":
        if array.dtype == np.uint16:
            array = (array >> 8).astype(np.uint8)
        array = array[..., :3] if array.shape[2] >= 3 else np.repeat(array[..., :1], 3, axis=2)
        if how.color == "gray":
            array = (array @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)[..., None]
    if how.bands:
        array = array[..., [b - 1 for b in how.bands]]
    if missing is not None:
        array = np.where(missing[..., None], np.asarray(how.mean).astype(array.dtype), array)
    if array.flags.writeable and array.flags.c_contiguous and array.dtype == how.dtype:
        return array, missing
    return np.array(array, dtype=how.dtype, order="C"), missing  # Pillow hands out read-only memory


def image_of(array: np.ndarray, nodata: float | None, how: Pixels) -> tuple[torch.Tensor, np.ndarray | None]:
    """Pixels [H, W, bands] as a file holds them as [C, H, W] in how.dtype, and where they are missing (bool [H, W])."""
    wanted, missing = _channels(array, nodata, how)
    return torch.from_numpy(wanted).permute(2, 0, 1), missing


def _missing(array: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Where some band is not finite or all bands are nodata, bool [H, W]; None where nothing is missing."""
    if nodata is None and array.dtype.kind != "f":
        return None
    bad = np.zeros(array.shape[:2], bool)
    if array.dtype.kind == "f":
        bad |= ~np.isfinite(array).all(-1)
    if nodata is not None and np.isfinite(nodata):
        bad |= np.asarray((array == nodata).all(-1))
    return bad if bad.any() else None


def _classes(values: np.ndarray, how: Pixels) -> np.ndarray:
    """Mask values as class numbers, IGNORE for the declared ignore value."""
    out = np.full(values.shape, IGNORE, np.int64)
    known = np.zeros(values.shape, bool)
    for number, value in enumerate(how.mask_values):
        hit = values == value
        out[hit] = number
        known |= hit
    if how.mask_ignore is not None:
        known |= values == how.mask_ignore
    if not known.all():
        raise IntegrityError(
            f"a mask holds the value {values[~known].flat[0]}, the manifest lists {list(how.mask_values)}"
        )
    return out


class Row(NamedTuple):
    """One encoded row on its way into a batch."""

    id: str
    path: str
    """In the source."""
    where: str
    image: Any
    mask: Any
    nodata: float | None
    label: str | None
    draw: int = 0
    """How often it was drawn before in this epoch."""
    number: int | None = None
    """Its place in the split; None where that is not known."""


class Blocks:
    """Memory of batches that nobody holds any more, for the next ones: touching new pages costs a tenth of decoding."""

    def __init__(self, most: int = 8) -> None:
        """Keep up to `most` blocks."""
        self._most, self._free = most, list[np.ndarray]()

    def tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        """Memory of any content, which comes back once neither the tensor nor a view of it is left."""
        size = math.prod(shape) * dtype.itemsize
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(0, np.uint8)
        if block.nbytes != size:
            block = np.empty(size, np.uint8)
        array = block.view(dtype).reshape(shape)
        weakref.finalize(array, self._take_back, block)  # the tensor holds this very array
        return torch.from_numpy(array)

    def _take_back(self, block: np.ndarray) -> None:
        if len(self._free) < self._most:
            self._free.append(block)


def fill(
    rows: list[Row],
    how: Pixels,
    seeds: tuple[int, int] | None,
    pool: ThreadPoolExecutor,
    parts: int,
    blocks: Blocks | None = None,
    shared: SharedPixels | None = None,
) -> "Filling":
    """Start decoding a batch on `pool`; `Filling.wait` gives it. `seeds`: (seed, epoch), None does not augment."""
    numbers = {name: place for place, name in enumerate(how.classes)}
    memory = _Memory(len(rows), how, blocks or Blocks(0))
    masks: list[Any] = [None] * len(rows)

    def work(first: int) -> float:
        began = time.perf_counter()
        mine = range(first, len(rows), parts)
        chances = {at: None if seeds is None else transforms.draws(*seeds, rows[at].id, rows[at].draw) for at in mine}
        kept = [at for at in mine if shared and shared.has(rows[at])]
        if shared and kept:
            _put_shared(rows, how, {at: chances.pop(at) for at in kept}, memory, masks, shared)
        done = _cropped(rows, how, chances, memory)
        for at in chances:
            if at in done:
                continue
            row, u = rows[at], chances[at]
            with _told(row):
                image, masks[at] = sample(row.image, row.mask, row.nodata, how, u, memory.at(at))
            memory.put(at, image)
        return time.perf_counter() - began

    futures = [pool.submit(work, first) for first in range(min(parts, len(rows)))]
    labels = None
    if rows and rows[0].mask is None:
        labels = np.array([numbers[r.label] if r.label is not None else -1 for r in rows], np.int64)
    return Filling(futures, memory, masks, labels, [r.id for r in rows], [r.path for r in rows])


@contextmanager
def _told(row: Row) -> Iterator[None]:
    """Errors with the row's place."""
    try:
        yield
    except (decode.BadImage, IntegrityError) as error:
        raise IntegrityError(
            f"{row.where}, row {row.id}: {error}; it was readable at ingest: run `scalecv data verify`"
        ) from None


def _put_shared(
    rows: list[Row],
    how: Pixels,
    chances: Mapping[int, np.ndarray | None],
    memory: "_Memory",
    masks: list[Any],
    shared: SharedPixels,
) -> None:
    """Put those rows into the batch which any process of this node decodes for all."""
    layout = shared.layout

    def place(at: int) -> torch.Tensor:
        known = None if shared.whole or not how.size_px else memory.at(at)
        if known is not None:
            return known
        size_bytes = layout.image_bytes
        own = _own_memory(size_bytes)[:size_bytes] if size_bytes <= LARGEST_KEPT else np.empty(size_bytes, np.uint8)
        return torch.from_numpy(own.view(layout.dtype).reshape(layout.shape)).permute(2, 0, 1)

    def decoded(at: int) -> Fixed:
        row = rows[at]
        if not shared.whole and _cropped(rows, how, {at: None}, memory):
            return Fixed(place(at))
        with _told(row):
            array, _ = _decoded(row.image, None, None)
            return _fixed(array, row.mask, row.nodata, how, memory.at(at), resizes=not shared.whole)

    numbers = {at: rows[at].number or 0 for at in chances}
    for at, fixed in shared.each(numbers, place, decoded):
        image, masks[at] = _varied(fixed, how, chances[at], None, memory.at(at))
        memory.put(at, image)


def _cropped(rows: list[Row], how: Pixels, chances: Mapping[int, np.ndarray | None], memory: "_Memory") -> set[int]:
    """Put the JPEGs among some rows into the batch, all of them in one call; the rows for which that was done.

    Args:
        chances: draws of each row, or None.
    """
    native, side = crops.load() if _is_plain(how) else None, how.size_px
    if native is None or not side:
        return set()
    jobs: dict[int, crops.Job] = {}
    most = 0
    for at, u in chances.items():
        row = rows[at]
        known = jpeg.header(row.image) if row.mask is None and row.nodata is None else None
        if known is None or known.channels != 3 or not known.height_at:
            continue
        box, flips = _box_and_flips(known, how, u)
        room = native.room(known, box, side)
        if room <= LARGEST_KEPT:
            jobs[at], most = (row.image, box, flips, memory.address(at)), max(most, room)
    if not jobs:
        return set()
    whole = native([*jobs.values()], side, _own_memory(most))
    done = {at for at, is_done in zip(jobs, whole.tolist(), strict=True) if is_done}
    rest = how.augment.model_copy(update={"resized_crop": None, "hflip": 0.0, "vflip": 0.0})
    memory.filled(done)
    if rest != _NOTHING:
        for at in done:
            memory.put(at, _augmented(memory.at(at), rest, how, chances[at]))
    return done


def _is_plain(how: Pixels) -> bool:
    """Whether pixels are the three colours of the file."""
    is_rgb = how.dtype == "uint8" and how.channels == 3 and how.color != "gray"
    return is_rgb and not how.bands and not how.marks_data


def _box_and_flips(known: jpeg.Header, how: Pixels, u: np.ndarray | None) -> tuple[transforms.Box, int]:
    """What of a picture is resized, and how it is flipped then: 1 left-right, 2 up-down."""
    height, width = known.height, known.width
    if u is not None and how.augment.resized_crop:
        box = transforms.crop_box(height, width, how.augment.resized_crop, u)
    elif how.resize == "crop":
        side = min(height, width)
        box = (height - side) // 2, (width - side) // 2, side, side
    else:
        box = 0, 0, height, width
    return box, 0 if u is None else int(u[4] < how.augment.hflip) + 2 * int(u[5] < how.augment.vflip)


def _augmented(image: Any, rest: Augment, how: Pixels, u: np.ndarray | None) -> torch.Tensor:
    if u is None:
        return image  # type: ignore[no-any-return]  # a tensor
    return transforms.recolour(transforms.move(image, None, rest, u, None)[0], rest, u, how.mean, how.std)


_NOTHING = Augment()


class _Memory:
    """The pixels of one batch: height, width, channel in memory, as decoders write and channels_last wants."""

    def __init__(self, rows: int, how: Pixels, blocks: Blocks) -> None:
        self._rows, self._lock, self._blocks = rows, threading.Lock(), blocks
        self._dtype = np.dtype(how.dtype)
        self._pixels: torch.Tensor | None = None
        self._address = self._row_bytes = 0
        self._shapes: set[tuple[int, ...]] = set()
        if how.size_px:
            self._allocate((how.size_px, how.size_px, how.channels))

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        self._pixels = self._blocks.tensor((self._rows, *shape), self._dtype)
        self._address = self._pixels.data_ptr()
        self._row_bytes = math.prod(shape) * self._dtype.itemsize
        return self._pixels

    def address(self, row: int) -> int:
        """Where a row's pixels belong, once their size is known."""
        return self._address + row * self._row_bytes

    def filled(self, rows: Collection[int]) -> None:
        """Hear that rows were written where they belong."""
        if rows and self._pixels is not None:
            height, width, channels = self._pixels.shape[1:]
            with self._lock:
                self._shapes.add((channels, height, width))

    def at(self, row: int) -> torch.Tensor | None:
        """Where a row's pixels belong, [C, H, W]; None while the size is not known."""
        return None if self._pixels is None else self._pixels[row].permute(2, 0, 1)

    def put(self, row: int, image: torch.Tensor) -> None:
        """Take [C, H, W], which may have been written in place."""
        with self._lock:
            upright = image.permute(1, 2, 0)
            self._shapes.add(tuple(image.shape))
            pixels = self._allocate(tuple(upright.shape)) if self._pixels is None else self._pixels
        place = pixels[row]
        if place.shape == upright.shape and place.data_ptr() != upright.data_ptr():
            place.copy_(upright)

    def images(self) -> torch.Tensor:
        """[B, C, H, W], channels_last."""
        if len(self._shapes) > 1 or self._pixels is None:
            raise DataError(f"images of one batch have the shapes {sorted(self._shapes)}: set data.size_px")
        return self._pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Filling:
    """A batch that is being decoded."""

    futures: list[Any]
    memory: _Memory
    masks: list[Any]
    labels: np.ndarray | None
    ids: list[str]
    paths: list[str]

    def wait(self) -> tuple[Batch, float]:
        """The batch without `valid` and `position`, and the seconds that threads took to decode it."""
        took = sum(future.result() for future in self.futures)
        batch: Batch = {"image": self.memory.images(), "id": self.ids, "path": self.paths}
        if self.masks[0] is not None:
            batch["mask"] = torch.stack(self.masks)
        elif self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels)
        return batch, took


def to_device(batch: Batch, how: Pixels, device: torch.device, channels_last: bool) -> dict[str, Any]:
    """The batch as normalised float32 on the device.

    Returns: "image" float32 [B, C, H, W], (x - mean) / std in the units of the files; "label" or "mask" int64; "valid"
        bool [B]; "id", "path" and "position" unchanged.
    """
    blocking = device.type != "cuda"
    image = batch["image"]
    if not blocking:
        image = image.pin_memory()
    image = image.to(device, non_blocking=not blocking)
    mean, scale = _mean_and_scale(how.mean, how.std, device)
    image = image.to(torch.float32).sub_(mean).mul_(scale)
    out: dict[str, Any] = dict(batch)
    out["image"] = image if channels_last else image.contiguous()
    for key in ("label", "mask", "valid"):
        if key in batch:
            value = batch[key] if blocking else batch[key].pin_memory()
            out[key] = value.to(device, non_blocking=not blocking)
    return out


@lru_cache(maxsize=8)
def _mean_and_scale(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [1, C, 1, 1] each, sent to the device once and not with each batch."""
    shape = (1, -1, 1, 1)
    return (
        torch.tensor(mean, dtype=torch.float32, device=device).view(shape),
        1 / torch.tensor(std, dtype=torch.float32, device=device).view(shape),
    )
