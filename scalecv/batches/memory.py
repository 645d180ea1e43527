"""Memory that batches are decoded into, used again and again."""

import math
import threading
import weakref
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from scalecv.batches.pixels import Pixels
from scalecv.errors import DataError


class Blocks:
    """Memory of batches that nobody holds any more, for the next ones: touching new pages costs a tenth of decoding."""

    def __init__(self, most: int = 2) -> None:
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


class BatchMemory:
    """The pixels of one batch: height, width, channel in memory, as decoders write and channels_last wants."""

    def __init__(self, rows: int, how: Pixels, blocks: Blocks) -> None:
        self._rows, self._lock, self._blocks = rows, threading.Lock(), blocks
        self._dtype = np.dtype(how.dtype)
        self._pixels: torch.Tensor | None = None
        self._images: torch.Tensor | None = None
        self._address = self._row_bytes = 0
        self._shapes: set[tuple[int, ...]] = set()
        if how.size_px:
            self._allocate((how.size_px, how.size_px, how.channels))

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        self._pixels = self._blocks.tensor((self._rows, *shape), self._dtype)
        self._images = self._pixels.permute(0, 3, 1, 2)  # made here: a call of torch gives the interpreter away
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
        if len(self._shapes) > 1 or self._images is None:
            raise DataError(f"images of one batch have the shapes {sorted(self._shapes)}: set data.size_px")
        return self._images
