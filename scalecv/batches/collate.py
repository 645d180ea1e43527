"""Encoded rows -> one batch of pixels, and the batch -> normalised tensors on the device.

Pixels stay in the dtype of the files until they are on the device; that is a quarter of the bytes of
float32, and normalising there costs next to nothing.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from scalecv.batches import transforms
from scalecv.batches.pixels import Pixels
from scalecv.errors import DataError, IntegrityError
from scalecv.schema import IGNORE, Batch
from scalecv.shards import decode


def sample(
    image: bytes, mask: bytes | None, nodata: float | None, how: Pixels, u: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One row as pixels.

    Args:
        image, mask: encoded bytes.
        nodata: value of pixels without data; they become 0 after normalisation and count nowhere in the mask.
        how: bands, size and augmentation.
        u: draws of the sample; None does not augment.
    Returns: image [C, H, W] in how.dtype (memory order H, W, C), mask int64 [H, W] with class numbers or None.
    """
    array = decode.decode_pixels(image)
    target = None if mask is None else torch.from_numpy(_classes(decode.decode_mask(mask), how))
    array, missing = _channels(array, nodata, how)
    if target is not None and missing is not None:
        target[torch.from_numpy(missing)] = IGNORE
    picture = torch.from_numpy(array).permute(2, 0, 1)
    cropped = u is not None and how.augment.resized_crop is not None
    if how.size_px and not cropped:
        picture, target = transforms.resize(picture, target, how.size_px, how.resize)
    if u is not None:
        picture, target = transforms.augment(picture, target, how.augment, u, how.size_px)
    return picture, target


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
    return np.array(array, dtype=how.dtype, order="C"), missing  # a copy: decoders hand out read-only memory


def _missing(array: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Where some band is not finite or all bands are nodata, bool [H, W]; None where nothing is missing."""
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


@dataclass(frozen=True)
class Row:
    """One encoded row on its way into a batch."""

    id: str
    path: str
    """In the source."""
    where: str
    image: Any
    mask: Any
    nodata: float | None
    label: str | None


def fill(
    rows: list[Row], how: Pixels, seeds: tuple[int, int] | None, pool: ThreadPoolExecutor, parts: int
) -> "Filling":
    """Start decoding a batch on `pool`; `Filling.wait` gives it. `seeds`: (seed, epoch), None does not augment."""
    numbers = {name: place for place, name in enumerate(how.classes)}
    images: list[Any] = [None] * len(rows)
    masks: list[Any] = [None] * len(rows)

    def work(first: int) -> None:
        for at in range(first, len(rows), parts):
            row = rows[at]
            u = None if seeds is None else transforms.draws(*seeds, row.id)
            try:
                images[at], masks[at] = sample(row.image, row.mask, row.nodata, how, u)
            except (decode.BadImage, IntegrityError) as error:
                raise IntegrityError(
                    f"{row.where}, row {row.id}: {error}; it was readable at ingest: run `scalecv data verify`"
                ) from None

    futures = [pool.submit(work, first) for first in range(min(parts, len(rows)))]
    labels = None
    if rows and rows[0].mask is None:
        labels = np.array([numbers[r.label] if r.label is not None else -1 for r in rows], np.int64)
    return Filling(futures, images, masks, labels, [r.id for r in rows], [r.path for r in rows])


@dataclass(frozen=True)
class Filling:
    """A batch that is being decoded."""

    futures: list[Any]
    images: list[Any]
    masks: list[Any]
    labels: np.ndarray | None
    ids: list[str]
    paths: list[str]

    def wait(self) -> Batch:
        """The batch without `valid` and `position`."""
        for future in self.futures:
            future.result()
        shapes = {tuple(i.shape) for i in self.images}
        if len(shapes) > 1:
            raise DataError(f"images of one batch have the shapes {sorted(shapes)}: set data.size_px")
        first = self.images[0]
        # Height, width, channel in memory: what decoders write and what channels_last wants.
        out = torch.empty((len(self.images), *first.shape), dtype=first.dtype, memory_format=torch.contiguous_format)
        out = out.to(memory_format=torch.channels_last)
        torch.stack(self.images, out=out)
        batch: Batch = {"image": out, "id": self.ids, "path": self.paths}
        if self.masks[0] is not None:
            batch["mask"] = torch.stack(self.masks)
        elif self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels)
        return batch


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
