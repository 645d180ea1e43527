"""One row on its way from encoded bytes to pixels."""

import threading
from functools import lru_cache

import numpy as np
import torch

from scalecv.batches import transforms
from scalecv.batches.pixels import Pixels
from scalecv.batches.slots import Fixed
from scalecv.errors import IntegrityError
from scalecv.jpeg import turbo
from scalecv.schema import IGNORE
from scalecv.shards import decode

LARGEST_KEPT = 16 << 20
"""Bytes of a picture up to which threads keep the memory that they decode into."""
_THREAD = threading.local()
_UNKNOWN = -1
"""In the place of a class's number."""


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
    array, box = decoded(image, crop if mask is None else None, u)
    return varied(fixed(array, mask, nodata, how, out, resizes=crop is None), how, u, box, out)


def fixed(
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


def varied(
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


def decoded(
    image: bytes, share: tuple[float, float] | None, u: np.ndarray | None
) -> tuple[np.ndarray, transforms.Box | None]:
    """The pixels [H, W, C] of an image, and the box that a crop will take of them; rows below it may be left out."""
    known = turbo.header(image)
    if known is None:
        return decode.decode_pixels(image), None
    if share is None or u is None:
        box, rows = None, None
    else:
        box = transforms.crop_box(known.height, known.width, share, u)
        rows = box[0] + box[2]
    size_bytes = known.height * known.width * known.channels
    pixels = turbo.decode(image, known, rows, own_memory(size_bytes) if size_bytes <= LARGEST_KEPT else None)
    return decode.decode_pixels(image) if pixels is None else pixels, box


def own_memory(size_bytes: int) -> np.ndarray:
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
    if values.dtype == np.uint8:
        out = _numbers(how.mask_values, how.mask_ignore).take(values)
    else:
        out = np.full(values.shape, _UNKNOWN, np.int64)
        for value, number in _known(how.mask_values, how.mask_ignore):
            out[values == value] = number
    strange = out == _UNKNOWN
    if strange.any():
        raise IntegrityError(
            f"a mask holds the value {values[strange].flat[0]}, the manifest lists {list(how.mask_values)}"
        )
    return out


def _known(mask_values: tuple[int, ...], ignore: int | None) -> list[tuple[int, int]]:
    """Each value of a mask with its number; a class that has the ignored value is a class."""
    ignored = [] if ignore is None else [(ignore, IGNORE)]
    return [*ignored, *((value, number) for number, value in enumerate(mask_values))]


@lru_cache(maxsize=16)
def _numbers(mask_values: tuple[int, ...], ignore: int | None) -> np.ndarray:
    """int64 [256], the number of each byte."""
    table = np.full(256, _UNKNOWN, np.int64)
    for value, number in _known(mask_values, ignore):
        if 0 <= value < len(table):
            table[value] = number
    return table
