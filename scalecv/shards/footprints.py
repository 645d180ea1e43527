"""Where rows lie, and which of them lie on each other: an image and its neighbour must not be in two splits.

A footprint is a parallelogram in a place: on the ground, where the place is a CRS, or in the pixels of a scene without
georeference, where the place is its path. Files that have coordinates and name no CRS are taken to mean the same one.
Footprints are sorted into cells of a grid, one grid for each power of two of their size, so that only neighbours are
compared, and many at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalecv import raster
from scalecv.raster import PIXELS, Profile, Transform
from scalecv.schema import SPLITS

SCENE = "scene:"
"""Begins the place of a footprint that is known in the pixels of a scene alone; by itself: coordinates without CRS."""


@dataclass(frozen=True)
class Footprints:
    """Footprints of many rows."""

    paths: Sequence[str]
    places: Sequence[str]
    corners: NDArray[np.float64]
    """[N, 4, 2] in the units of the place, half a pixel inside of the image, so that neighbours do not touch."""
    kinds: NDArray[np.int64]
    """[N]: only footprints of different kinds are compared: the number of a row's split."""

    @cached_property
    def lonlat(self) -> NDArray[np.float64]:
        """Corners [N, 4, 2] in degrees; NaN where the place does not say, or where no other CRS is to compare with."""
        out = np.full(self.corners.shape, np.nan)
        numbers = {place: number for number, place in enumerate(self._ground)}
        places = np.array([numbers.get(place, -1) for place in self.places], np.int64)
        for place in self._ground if len(self._ground) > 1 else ():
            some = places == numbers[place]
            out[some] = raster.to_lonlat(place, self.corners[some].reshape(-1, 2)).reshape(-1, 4, 2)
        return out

    @cached_property
    def strangers(self) -> list[int]:
        """Rows that cannot be compared with those of another CRS: theirs is tied to no ground, or they lie outside."""
        if len(self._ground) < 2:
            return []
        unknown = np.flatnonzero(np.isnan(self.lonlat).any((1, 2)))
        return [row for row in unknown.tolist() if self.places[row] in self._ground]

    @cached_property
    def _ground(self) -> tuple[str, ...]:
        """The CRS among the places."""
        return tuple(place for place in dict.fromkeys(self.places) if not place.startswith(SCENE))


def place_of(profile: Profile) -> tuple[str, Transform] | None:
    """The place of a file, and its transform there; None where it does not say, as one that has pixel sizes alone."""
    if profile.is_placed:
        return str(profile.crs), profile.transform
    has_origin = profile.transform != PIXELS and (profile.transform[2] != 0 or profile.transform[5] != 0)
    return (SCENE, profile.transform) if profile.crs is None and has_origin else None


def corners(transform: Transform, width: int, height: int) -> list[tuple[float, float]]:
    """The four corners, half a pixel inside."""
    a, b, c, d, e, f = transform
    inner = min(0.5, width / 4), min(0.5, height / 4)
    across, down = (inner[0], width - inner[0]), (inner[1], height - inner[1])
    around = [(across[0], down[0]), (across[1], down[0]), (across[1], down[1]), (across[0], down[1])]
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in around]


def overlapping(found: Footprints) -> Iterator[tuple[int, int]]:
    """Pairs of rows of different kinds that lie on each other; each pair once, the smaller number first.

    Footprints of different CRS are compared in longitude and latitude, but for `Footprints.strangers`.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(found.places))}
    places = np.array([names[place] for place in found.places], np.int64)
    yield from _pairs(found.corners, places, found.kinds, None)
    chosen = np.flatnonzero(np.isfinite(found.lonlat).all((1, 2)))
    for i, j in _pairs(found.lonlat[chosen], np.zeros(len(chosen), np.int64), found.kinds[chosen], places[chosen]):
        yield int(chosen[i]), int(chosen[j])


def _pairs(
    quads: NDArray[np.float64], places: NDArray[np.int64], kinds: NDArray[np.int64], others: NDArray[np.int64] | None
) -> Iterator[tuple[int, int]]:
    """Pairs within a place of different kinds; where `others` is given, also of different ones of these."""
    low, high = quads.min(1), quads.max(1)
    side = np.maximum((high - low).max(1), 1e-12)
    levels = np.ceil(np.log2(side)).astype(np.int64)
    for level in np.unique(levels):
        cell = 2.0**level
        rows = np.flatnonzero(levels <= level)
        entries, keys = _cells(low[rows], high[rows], places[rows], cell)
        entries = rows[entries]
        order = np.lexsort((entries, *keys.T[::-1]))
        entries, keys = entries[order], keys[order]
        for step in range(1, len(entries)):
            same = np.flatnonzero((keys[step:] == keys[:-step]).all(1))
            if not len(same):
                break
            i, j = entries[same], entries[same + step]
            keep = (kinds[i] != kinds[j]) & (np.maximum(levels[i], levels[j]) == level)
            if others is not None:
                keep &= others[i] != others[j]
            i, j, at = i[keep], j[keep], keys[same][keep]
            # A pair that shares several cells counts in the one of its lower corner.
            corner = np.maximum(low[i], low[j])
            first = (np.floor(corner / cell).astype(np.int64) == at[:, 1:]).all(1)
            i, j = i[first], j[first]
            hit = _meet(quads[i], quads[j])
            yield from zip(np.minimum(i, j)[hit].tolist(), np.maximum(i, j)[hit].tolist(), strict=True)


def _cells(
    low: NDArray[np.float64], high: NDArray[np.float64], places: NDArray[np.int64], cell: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of boxes and the cells [M, 3] (place, x, y) that each covers, up to four of them."""
    first, last = np.floor(low / cell).astype(np.int64), np.floor(high / cell).astype(np.int64)
    numbers, keys = [], []
    for dx in (0, 1):
        for dy in (0, 1):
            here = np.flatnonzero((first[:, 0] + dx <= last[:, 0]) & (first[:, 1] + dy <= last[:, 1]))
            numbers.append(here)
            keys.append(np.stack([places[here], first[here, 0] + dx, first[here, 1] + dy], axis=1))
    return np.concatenate(numbers), np.concatenate(keys)


def _meet(a_N42: NDArray[np.float64], b_N42: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether parallelograms share an area: no side of either separates them (separating axis theorem)."""
    meet = np.ones(len(a_N42), bool)
    for quad in (a_N42, b_N42):
        for side in (0, 1):
            edge = quad[:, side + 1] - quad[:, side]
            axis = np.stack([-edge[:, 1], edge[:, 0]], axis=1)[:, None]
            a, b = (a_N42 * axis).sum(2), (b_N42 * axis).sum(2)
            meet &= (a.max(1) > b.min(1)) & (b.max(1) > a.min(1))
    return meet


def leaks(found: Footprints) -> list[dict[str, Any]]:
    """For each two splits whose rows lie on each other: splits, pairs, and the paths of one pair."""
    seen: dict[tuple[int, int], dict[str, Any]] = {}
    for i, j in overlapping(found):
        if found.kinds[i] > found.kinds[j]:
            i, j = j, i
        splits = (int(found.kinds[i]), int(found.kinds[j]))
        names = SPLITS[splits[0]], SPLITS[splits[1]]
        told = seen.setdefault(splits, {"splits": names, "pairs": 0, "example": (found.paths[i], found.paths[j])})
        told["pairs"] += 1
        told["example"] = min(told["example"], (found.paths[i], found.paths[j]))
    return [seen[splits] for splits in sorted(seen)]


def components(found: Footprints) -> list[int]:
    """For each row the number of the first row that it is joined with by overlaps; set kinds to different numbers."""
    above = list(range(len(found.paths)))

    def top(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    for i, j in overlapping(found):
        a, b = top(i), top(j)
        above[max(a, b)] = min(a, b)
    return [top(i) for i in range(len(above))]
