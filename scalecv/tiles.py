"""Windows over a scene: where they lie, and how what was computed on each becomes one whole again. Pure geometry.

    grid ──▶ windows in rows, neighbours overlap ──▶ (values of each window) ──▶ stitch ──▶ rows of the whole

At the far edges the last window is moved inwards, so that every pixel is a real one and all windows have one size;
only a scene that is smaller than a window gives smaller windows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, order=True)
class Window:
    """A rectangle of pixels."""

    row: int
    col: int
    height: int
    width: int

    def __str__(self) -> str:
        """As rows and paths name it: column, row, width, height."""
        return f"{self.col},{self.row},{self.width},{self.height}"

    @staticmethod
    def parse(text: str) -> "Window":
        """The window that `str` told."""
        col, row, width, height = map(int, text.split(","))
        return Window(row, col, height, width)

    @property
    def pixels(self) -> int:
        """Its area."""
        return self.height * self.width

    def around(self, other: "Window") -> "Window":
        """The smallest window that holds both."""
        row, col = min(self.row, other.row), min(self.col, other.col)
        bottom = max(self.row + self.height, other.row + other.height)
        right = max(self.col + self.width, other.col + other.width)
        return Window(row, col, bottom - row, right - col)


def starts(length: int, size: int, overlap: int) -> list[int]:
    """First pixels of windows of `size` that cover `length`; the last one is moved inwards to end where it ends."""
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def grid(width: int, height: int, size: int, overlap: int, col: int = 0, row: int = 0) -> Iterator[Window]:
    """Windows of `size` px over an area, row by row; neighbours share at least `overlap` px.

    Args:
        width, height: of the area.
        size: side of a window; an area that is smaller gives smaller ones.
        overlap: pixels shared by neighbours, less than `size`.
        col, row: where the area lies.
    """
    across = starts(width, size, overlap)
    for top in starts(height, size, overlap):
        for left in across:
            yield Window(row + top, col + left, min(size, height), min(size, width))


def weights(window: Window, width: int, height: int, overlap: int) -> NDArray[np.float32]:
    """float32 [h, w]: how much each pixel of a window counts in the whole.

    Towards a neighbour the outer quarter of the overlap counts nothing, the inner quarter all, and the half between
    rises evenly: what a network says beside a cut is not used, and nothing jumps. At the scene's own edges all counts.
    """
    down = _ramp(window.height, overlap, window.row > 0, window.row + window.height < height)
    across = _ramp(window.width, overlap, window.col > 0, window.col + window.width < width)
    return down[:, None] * across[None, :]


def _ramp(size: int, overlap: int, before: bool, after: bool) -> NDArray[np.float32]:
    out = np.ones(size, np.float32)
    if overlap:
        at = np.arange(overlap, dtype=np.float32) + 0.5
        rising = np.clip((at - overlap / 4) / (overlap / 2), 0, 1)
        if before:
            out[:overlap] *= rising
        if after:
            out[-overlap:] *= rising[::-1]
    return out


def stitch(
    parts: Iterable[tuple[Window, NDArray[Any]]], width: int, height: int, overlap: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The weighted mean of overlapping windows, as rows of the whole; what is held is one row of windows.

    Args:
        parts: (window, values [K, h, w]) in the order of `grid` over the whole scene.
        width, height: of the scene.
        overlap: as given to `grid`.

    Yields: (first row, float32 [K, rows, width]), from the top to the bottom, each row once.
    """
    top = 0
    total: NDArray[np.float32] | None = None
    for window, values in parts:
        if total is None:
            total = np.zeros((len(values), window.height, width), np.float32)
            weight = np.zeros((window.height, width), np.float32)
        if window.row > top:
            done = window.row - top
            yield top, total[:, :done] / weight[:done]
            total, weight, top = _moved(total, done), _moved(weight, done), window.row
        share = weights(window, width, height, overlap)
        across = slice(window.col, window.col + window.width)
        total[:, :, across] += values * share
        weight[:, across] += share
    if total is not None:
        yield top, total / weight


def _moved(held: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    out = np.zeros_like(held)
    out[..., : held.shape[-2] - rows, :] = held[..., rows:, :]
    return out
