"""Count, mean, deviation and range of an image's bands."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict  # of typing only from Python 3.12 on, for pydantic

_ACROSS = 512
_HANDY = (64, 8192)
"""Widths of images whose rows are added as they are; others are cut into rows of _ACROSS, and what is left over."""
_DOWN = 64


class BandSums(TypedDict):
    """Sums over the pixels of one image, one number per band."""

    pixels: int
    mean: list[float]
    m2: list[float]
    """Sum of squared distances from the mean."""
    min: list[float]
    max: list[float]


def band_sums(pixels_NC: NDArray[Any], width: int | None = None) -> BandSums:
    """Count, mean, squared distance from the mean, smallest and largest of [N, C], in float64.

    Args:
        pixels_NC: the pixels.
        width: of the image, where these are whole rows of one; it only saves time.
    """
    count, bands = pixels_NC.shape
    if count == 0:
        zeros = [0.0] * bands
        return {"pixels": 0, "mean": zeros, "m2": zeros, "min": zeros, "max": zeros}
    if pixels_NC.dtype == np.uint8:
        is_handy = width is not None and _HANDY[0] <= width <= _HANDY[1]
        return _byte_sums(pixels_NC, width if width is not None and is_handy else _ACROSS)
    mean = pixels_NC.mean(axis=0, dtype=np.float64)
    m2 = np.zeros(bands)
    for start in range(0, count, 1 << 20):  # no second copy of a large raster in float64
        m2 += np.square(pixels_NC[start : start + (1 << 20)] - mean).sum(axis=0)
    low, high = (np.asarray(edge, np.float64) for edge in (pixels_NC.min(axis=0), pixels_NC.max(axis=0)))
    return {"pixels": count, "mean": mean.tolist(), "m2": m2.tolist(), "min": low.tolist(), "max": high.tolist()}


def _byte_sums(pixels_NC: NDArray[Any], across: int) -> BandSums:
    """`band_sums` of uint8, from sums of whole numbers that are exact.

    Pixels lie side by side in wide rows, which numpy adds fast; a column of 64 squares stays below 2^24, where float32
    is exact.
    """
    count, bands = pixels_NC.shape
    across = min(count, across)
    down = count // across
    wide = np.ascontiguousarray(pixels_NC[: down * across]).reshape(down, across * bands)
    rest = pixels_NC[down * across :]
    total, square = np.zeros((2, across * bands))
    for start in range(0, down, _DOWN):
        part = wide[start : start + _DOWN].astype(np.float32)
        total += np.ones(len(part), np.float32) @ part
        square += np.einsum("ij,ij->j", part, part)
    each = np.ones(across)
    sums = each @ total.reshape(across, bands), each @ square.reshape(across, bands)
    edges = wide.min(axis=0).reshape(across, bands), wide.max(axis=0).reshape(across, bands)
    if len(rest):
        edges = np.vstack([edges[0], rest]), np.vstack([edges[1], rest])
        more = rest.astype(np.float64)
        sums = sums[0] + more.sum(axis=0), sums[1] + np.square(more).sum(axis=0)
    low, high = (np.ascontiguousarray(edge.T) for edge in edges)  # numpy is slow along an axis beside a short one
    return of_whole_numbers(count, *sums, low.min(axis=1), high.max(axis=1))


def of_whole_numbers(
    pixels: int, total: Iterable[Any], square: Iterable[Any], low: Iterable[Any], high: Iterable[Any]
) -> BandSums:
    """The sums of `pixels` whole numbers per band, from their sum, their squares' sum, the smallest and the largest."""
    totals, squares = ([int(number) for number in some] for some in (total, square))
    return {
        "pixels": pixels,
        "mean": [t / pixels for t in totals],
        "m2": [(pixels * s - t * t) / pixels for t, s in zip(totals, squares, strict=True)],
        "min": [float(number) for number in low],
        "max": [float(number) for number in high],
    }
