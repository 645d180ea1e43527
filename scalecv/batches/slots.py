"""How the pixels of a row, before anything random, lie in a slot of a file: all slots of a split have one size.

CRC-32, parts | image [H, W, C] | mask [H, W] | bits of pixels without data
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from scalecv.batches.pixels import Pixels
from scalecv.shards.manifest import Manifest

_HEAD = struct.Struct("<II")
_IMAGE, _TARGET, _MISSING = 1, 2, 4


class Fixed(NamedTuple):
    """A row as pixels, before anything random."""

    image: torch.Tensor
    """[C, H, W] in the dtype of a batch; memory order H, W, C."""
    target: torch.Tensor | None = None
    """int64 [H, W], class numbers or IGNORE."""
    missing: torch.Tensor | None = None
    """bool [H, W], pixels without data."""


@dataclass(frozen=True)
class Layout:
    """What a slot has room for."""

    shape: tuple[int, int, int]
    """Height, width and channels of the image."""
    dtype: str
    target_dtype: str | None
    """None where there are no masks."""

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.shape[0] * self.shape[1]

    @property
    def image_bytes(self) -> int:
        """Of the image."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def target_bytes(self) -> int:
        """Of the mask."""
        return self.pixels * np.dtype(self.target_dtype).itemsize if self.target_dtype else 0

    @property
    def slot_bytes(self) -> int:
        """Of all parts."""
        return _HEAD.size + self.image_bytes + self.target_bytes + (self.pixels + 7) // 8

    def pack(self, row: Fixed) -> list[memoryview] | None:
        """The pieces of a slot, one after the other; None where the row has no room in it."""
        if tuple(row.image.permute(1, 2, 0).shape) != self.shape or (row.target is not None and not self.target_dtype):
            return None
        image = bytes_of(row.image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
        target, missing = np.zeros(self.target_bytes, np.uint8), np.zeros((self.pixels + 7) // 8, np.uint8)
        parts = _IMAGE
        if row.target is not None:
            target = row.target.numpy().astype(self.target_dtype).reshape(-1).view(np.uint8)
            parts |= _TARGET
        if row.missing is not None:
            missing = np.packbits(row.missing.numpy())
            parts |= _MISSING
        pieces = [image, target.data, missing.data]
        return [memoryview(_HEAD.pack(_checksum(parts, pieces), parts)), *pieces]

    def room(self, out: torch.Tensor) -> list[memoryview]:
        """Where to read a slot to: its image into `out`, [C, H, W] with memory order H, W, C."""
        head, target, missing = (
            memoryview(bytearray(size)) for size in (_HEAD.size, self.target_bytes, (self.pixels + 7) // 8)
        )
        return [head, bytes_of(out), target, missing]

    def unpack(self, pieces: list[memoryview], out: torch.Tensor) -> Fixed | None:
        """The row of a slot that was read to `room(out)`; None where it is not there whole."""
        checksum, parts = _HEAD.unpack(pieces[0])
        if not parts & _IMAGE or checksum != _checksum(parts, pieces[1:]):
            return None
        target = missing = None
        if parts & _TARGET:
            values = np.frombuffer(pieces[2], self.target_dtype).astype(np.int64)
            target = torch.from_numpy(values.reshape(self.shape[:2]))
        if parts & _MISSING:
            bits = np.unpackbits(np.frombuffer(pieces[3], np.uint8), count=self.pixels)
            missing = torch.from_numpy(bits.astype(bool).reshape(self.shape[:2]))
        return Fixed(out, target, missing)


def layout_of(how: Pixels, manifest: Manifest, *, whole: bool) -> Layout | None:
    """What is kept of a row; None where rows have several sizes.

    Args:
        how: what a batch holds.
        manifest: of the dataset.
        whole: whether rows are kept at their own size, because a random crop is resized afterwards.
    """
    width, height, *largest = manifest.sizes_px
    if how.size_px and not whole:
        width = height = how.size_px
    elif [width, height] != largest:
        return None
    has_target = bool(how.mask_values) or how.marks_data
    small = "int8" if len(how.mask_values) <= np.iinfo(np.int8).max else "int32"
    return Layout((height, width, how.channels), how.dtype, small if has_target else None)


def bytes_of(image: torch.Tensor) -> memoryview:
    """The memory of an image [C, H, W] whose memory order is H, W, C."""
    return image.permute(1, 2, 0).numpy().reshape(-1).view(np.uint8).data


def _checksum(parts: int, pieces: list[Any]) -> int:
    """CRC-32, begun with `parts`, so that no slot of zeros has it right."""
    checksum = parts
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum
