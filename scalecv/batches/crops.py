"""Crops of JPEG files by our own C (scalecv/jpeg/crops.c): the same pixels, sooner.

Of a file only the crop's part becomes pixels, and a run of files is one call, during which other threads run. Where
there is no native library (see `scalecv.jpeg.native`), `scalecv.batches.collate` gives the same by other libraries.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from scalecv.batches import transforms
from scalecv.jpeg import native, turbo
from scalecv.jpeg.build import missing

Job = tuple[bytes, transforms.Box, int, int]
"""An encoded picture, the box to take, flips (1: left-right, 2: up-down), and the address where it goes: height, width,
channel in memory."""


class Crops:
    """The compiled functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._crop, self._room = library.crop_images, library.room
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._crop.argtypes = [number, pointer, pointer, pointer, number, pointer, pointer, size, pointer]
        self._crop.restype = None
        self._room.argtypes, self._room.restype = [number] * 4, size

    def room(self, known: turbo.Header, box: transforms.Box, side: int) -> int:
        """Bytes of memory that one picture takes."""
        return int(self._room(known.width, box[2], box[3], side))

    def __call__(self, jobs: Sequence[Job], side: int, memory: np.ndarray) -> np.ndarray:
        """Decode, cut, resize and flip pictures into their places; bool [N], False where one was left alone.

        Args:
            jobs: pictures.
            side: of each of them as it is to be.
            memory: uint8, of this thread, with room for each of them.
        """
        data = (ctypes.c_char_p * len(jobs))(*[job[0] for job in jobs])
        sizes = np.array([len(job[0]) for job in jobs], np.uintp)
        boxes = np.array([(*job[1], job[2]) for job in jobs], np.int32)
        places = np.array([job[3] for job in jobs], np.uintp)
        left = np.empty(len(jobs), np.uint8)
        self._crop(
            len(jobs), ctypes.addressof(data), sizes.ctypes.data, boxes.ctypes.data, side, places.ctypes.data,
            memory.ctypes.data, memory.size, left.ctypes.data,
        )  # fmt: skip
        return np.asarray(left == 0)


@lru_cache(maxsize=1)
def load() -> Crops | None:
    """What makes crops on this machine; None where it cannot. The first call ever may compile, some seconds."""
    return native.find(Crops, _is_exact)


def state() -> str:
    """One line on who makes crops here."""
    if load() is not None:
        return "native crops of JPEGs"
    if native.is_off():
        return f"crops without native code, for {native.SWITCH}=0"
    lacks = missing()
    why = (
        f", for want of {lacks} (Debian: gcc libjpeg-dev): twice the time"
        if lacks
        else ": it does not compile or load here, or gives other pixels"
    )
    return f"crops without native code{why}"


def _is_exact(made: Crops) -> bool:
    """Whether a picture comes out as by simplejpeg and torch."""
    import simplejpeg

    rng = np.random.default_rng(0)
    noise = np.repeat(np.repeat(rng.integers(0, 256, (12, 14, 3), np.uint8), 7, 0), 7, 1)
    box: transforms.Box = (9, 21, 61, 70)
    for sampling, side in (("444", 32), ("422", 96), ("420", 32), ("440", 96), ("411", 32)):
        data = simplejpeg.encode_jpeg(noise, quality=85, colorsubsampling=sampling)
        known: Any = turbo.header(data)
        out = torch.empty((side, side, 3), dtype=torch.uint8).permute(2, 0, 1)
        done = made([(data, box, 1, out.data_ptr())], side, np.empty(made.room(known, box, side), np.uint8))
        whole = torch.from_numpy(turbo.decode(data, known)).permute(2, 0, 1)
        cut = whole[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        if not done[0] or not torch.equal(out, transforms.scaled(cut, side, side).flip(-1)):
            return False
    return True
