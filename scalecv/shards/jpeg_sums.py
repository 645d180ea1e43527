"""Sums over a JPEG's bands, and whether libjpeg-turbo reads it to its end without a word, at the least cost.

Entropy code is where damage shows: all of it is decoded. Pixels are made of some strips of rows only, spread over the
height, by the fast DCT. Our own C (scalecv/jpeg/sums.c) saves the other rows' pixels; simplejpeg makes them all, and
the sums are the same.
"""

import ctypes
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalecv.jpeg import native, turbo
from scalecv.shards.band_sums import BandSums, band_sums, of_whole_numbers

STRIP = 16
"""Rows: what libjpeg makes at once of most files."""
SAMPLED_PIXELS = 1 << 13
"""Of an image with more, some rows count."""
ROWS = 48
"""Of these rows at least."""
SHARE = 4
"""Where that leaves a choice, one strip in so many."""
STRIPS = 16
"""Of large images, about so many."""
_HASHED_BYTES = 1024
_KEPT_BYTES = 24 << 20
"""Of pixels, for the next image. Our C needs 2.8 MB for the widest rows that a JPEG can have, 65,535 px."""


def of_file(data: bytes, known: turbo.Header) -> BandSums | None:
    """The sums of an ordinary JPEG; None where libjpeg-turbo has something to say."""
    sums, where = by_c(), strips(known.height, known.width, data)
    if sums is None:
        return _plain(data, known, *where)
    numbers = sums(data, known, *where)
    return None if numbers is None else of_numbers(numbers)


def of_numbers(numbers: Sequence[int]) -> BandSums:
    """The sums as they are told: pixels, then for each band sum, sum of squares, smallest, largest.

    Raises: ValueError: no pixels of bytes have such sums, or not four numbers for each of one or three bands.
    """
    pixels, *bands = numbers
    kinds = [bands[kind::4] for kind in range(4)]
    if (
        pixels < 1
        or len(bands) not in (4, 12)
        or any(
            not 0 <= low * pixels <= total <= high * pixels <= 255 * pixels or total * total > pixels * square
            for total, square, low, high in zip(*kinds, strict=True)
        )
    ):
        raise ValueError(f"{len(numbers)} numbers are no sums of {pixels} pixels")
    return of_whole_numbers(pixels, *kinds)


def sampled(pixels: NDArray[Any], data: bytes) -> NDArray[Any]:
    """The rows of [H, W, C] that count."""
    height, width, _ = pixels.shape
    return _rows(pixels, *strips(height, width, data))


def strips(height: int, width: int, data: bytes) -> tuple[int, int]:
    """The first strip that counts, and from one to the next.

    Where the first one lies hangs on the file's bytes, so that over many images all heights count alike.
    """
    fewest = max(ROWS, -(-SAMPLED_PIXELS // width))
    step = max(1, min(height // fewest, max(SHARE, height // (STRIP * STRIPS))))
    middle = len(data) // 2
    mixed = zlib.crc32(data[-_HASHED_BYTES:], zlib.crc32(data[middle : middle + _HASHED_BYTES], len(data)))
    return mixed % step, step


def _rows(pixels: NDArray[Any], first: int, step: int) -> NDArray[Any]:
    if step == 1:
        return pixels
    strip = np.arange(len(pixels)) // STRIP
    counted: NDArray[Any] = pixels[(strip >= first) & ((strip - first) % step == 0)]
    return counted


def _plain(data: bytes, known: turbo.Header, first: int, step: int) -> BandSums | None:
    size_bytes = known.height * known.width * known.channels
    memory = _kept() if size_bytes <= _KEPT_BYTES else None
    pixels = turbo.decode(data, known, memory=memory, is_exact=False)
    return None if pixels is None else band_sums(_rows(pixels, first, step).reshape(-1, known.channels), known.width)


class Sums:
    """The compiled function, for one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._sum = library.sum_rows
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._sum.argtypes = [ctypes.c_char_p, size, *[number] * 5, pointer, size, pointer]
        self._memory, self._out = _kept(), np.zeros((13,), np.uint64)
        self._places = self._memory.ctypes.data, self._memory.size, self._out.ctypes.data

    def __call__(self, data: bytes, known: turbo.Header, first: int, step: int) -> list[int] | None:
        """Numbers over the strips, as `of_numbers` takes them; None where libjpeg-turbo has something to say."""
        height, width, bands, _ = known
        if self._sum(data, len(data), width, height, bands, first, step, *self._places):
            return None
        numbers: list[int] = self._out[: 1 + 4 * bands].tolist()
        return numbers


@lru_cache(maxsize=1)
def by_c() -> Sums | None:
    """The compiled function, if this machine has it; the first call ever may compile, some seconds."""
    return native.find(Sums, _is_exact)


def _is_exact(made: Sums) -> bool:
    """Whether the sums are those by simplejpeg, and damage is told."""
    import simplejpeg

    rng = np.random.default_rng(0)
    noise = np.repeat(np.repeat(rng.integers(0, 256, (19, 14, 3), np.uint8), 7, 0), 7, 1)
    for sampling in ("444", "422", "420", "440", "411", "Gray"):
        kinds: dict[str, Any] = {"colorspace": "RGB", "colorsubsampling": sampling}
        data = simplejpeg.encode_jpeg(noise, quality=85, **kinds)
        known: Any = turbo.header(data)
        for first, step in ((0, 1), (1, 3), (2, 4)):
            numbers = made(data, known, first, step)
            if numbers is None or of_numbers(numbers) != _plain(data, known, first, step):
                return False
        if made(data[: len(data) * 2 // 3], known, 0, 4) is not None:
            return False
    return True


@lru_cache(maxsize=1)
def _kept() -> NDArray[np.uint8]:
    """Where one image's pixels lie after another's: fresh memory costs time for each page."""
    return np.empty(_KEPT_BYTES, np.uint8)
