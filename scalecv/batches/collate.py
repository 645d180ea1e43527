"""Encoded rows -> one batch of pixels, and the batch -> normalised tensors on the device.

Pixels stay in the dtype of the files until they are on the device; that is a quarter of the bytes of
float32, and normalising there costs next to nothing.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from scalecv.batches import crops, samples, transforms
from scalecv.batches.memory import BatchMemory, Blocks
from scalecv.batches.pixels import Pixels
from scalecv.batches.shared_pixels import SharedPixels
from scalecv.batches.slots import Fixed
from scalecv.config import Augment
from scalecv.errors import IntegrityError
from scalecv.jpeg import turbo
from scalecv.schema import Batch
from scalecv.shards import decode


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
    memory = BatchMemory(len(rows), how, blocks or Blocks(0))
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
                image, masks[at] = samples.sample(row.image, row.mask, row.nodata, how, u, memory.at(at))
            memory.put(at, image)
        return time.perf_counter() - began

    futures = [pool.submit(work, first) for first in range(min(parts, len(rows)))]
    return Filling(futures, memory, masks, labels_of(rows, how), [r.id for r in rows], [r.path for r in rows])


def labels_of(rows: list[Row], how: Pixels) -> np.ndarray | None:
    """Class number of each row, int64, -1 where it has none; None where rows have masks."""
    if not rows or rows[0].mask is not None:
        return None
    numbers = {name: place for place, name in enumerate(how.classes)}
    return np.array([numbers[row.label] if row.label is not None else -1 for row in rows], np.int64)


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
    memory: BatchMemory,
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
        own = (
            samples.own_memory(size_bytes)[:size_bytes]
            if size_bytes <= samples.LARGEST_KEPT
            else np.empty(size_bytes, np.uint8)
        )
        return torch.from_numpy(own.view(layout.dtype).reshape(layout.shape)).permute(2, 0, 1)

    def fixed_of(at: int) -> Fixed:
        row = rows[at]
        if not shared.whole and _cropped(rows, how, {at: None}, memory):
            return Fixed(place(at))
        with _told(row):
            array, _ = samples.decoded(row.image, None, None)
            return samples.fixed(array, row.mask, row.nodata, how, memory.at(at), resizes=not shared.whole)

    numbers = {at: rows[at].number or 0 for at in chances}
    for at, fixed in shared.each(numbers, place, fixed_of):
        image, masks[at] = samples.varied(fixed, how, chances[at], None, memory.at(at))
        memory.put(at, image)


def _cropped(rows: list[Row], how: Pixels, chances: Mapping[int, np.ndarray | None], memory: BatchMemory) -> set[int]:
    """Put the JPEGs among some rows into the batch, all of them in one call; the rows for which that was done.

    Args:
        chances: draws of each row, or None.
    """
    native, side = crops.load() if is_plain(how) else None, how.size_px
    if native is None or not side:
        return set()
    jobs: dict[int, crops.Job] = {}
    most = 0
    for at, u in chances.items():
        row = rows[at]
        known = turbo.header(row.image) if row.mask is None and row.nodata is None else None
        if known is None or known.channels != 3 or not known.height_at:
            continue
        box, flips = box_and_flips(known, how, u)
        if box[3] < _NARROWEST:
            continue
        room = native.room(known, box, side)
        if room <= samples.LARGEST_KEPT:
            jobs[at], most = (row.image, box, flips, memory.address(at)), max(most, room)
    if not jobs:
        return set()
    whole = native([*jobs.values()], side, samples.own_memory(most))
    done = {at for at, is_done in zip(jobs, whole.tolist(), strict=True) if is_done}
    rest = rest_of(how.augment)
    memory.filled(done)
    if rest != NOTHING:
        for at in done:
            memory.put(at, augmented(memory.at(at), rest, how, chances[at]))
    return done


def is_plain(how: Pixels) -> bool:
    """Whether pixels are the three colours of a photograph."""
    is_rgb = how.dtype == "uint8" and how.channels == 3 and how.color != "gray"
    return is_rgb and not how.bands and not how.marks_data


def box_and_flips(known: turbo.Header, how: Pixels, u: np.ndarray | None) -> tuple[transforms.Box, int]:
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


def rest_of(how: Augment) -> Augment:
    """What is left of an augmentation after crop, resize and flips."""
    return how.model_copy(update={"resized_crop": None, "hflip": 0.0, "vflip": 0.0})


def augmented(image: Any, rest: Augment, how: Pixels, u: np.ndarray | None) -> torch.Tensor:
    """[C, H, W] with what is left of its augmentation, in its dtype and on its device."""
    if u is None:
        return image  # type: ignore[no-any-return]  # a tensor
    return transforms.recolour(transforms.move(image, None, rest, u, None)[0], rest, u, how.mean, how.std)


NOTHING = Augment()
_NARROWEST = 2
"""Pixels: of a box one pixel wide libjpeg may decode a single column of colour, which it enlarges in another way."""


@dataclass(frozen=True)
class Filling:
    """A batch that is being decoded."""

    futures: list[Any]
    memory: BatchMemory
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
    if not blocking and image.device.type == "cpu":  # else the GPU has decoded it
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
