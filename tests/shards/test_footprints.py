"""Overlaps, compared with every pair looked at by itself."""

import itertools

import numpy as np
import pytest

from scalecv.shards.footprints import Footprints, components, corners, leaks, overlapping


def made(transforms, sizes, places, kinds) -> Footprints:
    quads = [corners(t, *s) for t, s in zip(transforms, sizes, strict=True)]
    return Footprints([f"{i}" for i in range(len(quads))], places, np.array(quads, float), np.array(kinds))


@pytest.mark.parametrize("turned", [False, True])
def test_pairs_are_those_that_share_an_area(turned):
    rng = np.random.default_rng(0)
    transforms, sizes, kinds = [], [], []
    for _ in range(80):
        scale = float(rng.choice([1.0, 1.0, 7.0, 0.1]))
        angle = float(rng.random() * 3) if turned else 0.0
        c, s = scale * np.cos(angle), scale * np.sin(angle)
        transforms.append((c, s, *rng.uniform(-200, 200, 1).tolist(), s, -c, *rng.uniform(-200, 200, 1).tolist()))
        sizes.append((int(rng.integers(5, 60)), int(rng.integers(5, 60))))
        kinds.append(int(rng.integers(0, 3)))
    places = [f"scene:{i % 2}" for i in range(80)]
    found = made(transforms, sizes, places, kinds)
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(80), 2)
        if kinds[i] != kinds[j] and places[i] == places[j] and _share(found.corners[i], found.corners[j])
    }
    got = list(overlapping(found))
    assert len(got) == len(set(got)) and set(got) == expected and len(expected) > 10


def _share(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a linear programme finds a point inside of both."""
    from scipy.optimize import linprog

    rows, limits = [], []
    for quad in (a, b):
        (ax, ay), (bx, by) = quad[1] - quad[0], quad[2] - quad[1]
        turn = np.sign(ax * by - ay * bx)
        for k in range(4):
            edge = quad[(k + 1) % 4] - quad[k]
            normal = turn * np.array([edge[1], -edge[0]])
            rows.append([*normal, np.linalg.norm(normal)])
            limits.append(normal @ quad[k])
    best = linprog([0, 0, -1], A_ub=rows, b_ub=limits, bounds=[(None, None)] * 2 + [(None, 1e3)])
    return bool(best.status == 0 and best.x[2] > 1e-9)


def test_neighbours_that_touch_do_not_overlap_and_one_pixel_more_does():
    north_up = lambda col: (0.3, 0, 0.3 * col, 0, -0.3, 0)  # noqa: E731
    for col, pairs in ((100, []), (99, []), (98, [(0, 1)])):
        found = made([north_up(0), north_up(col)], [(100, 100)] * 2, ["EPSG:3826"] * 2, [0, 1])
        assert list(overlapping(found)) == pairs, "a pixel in common is rounding, more is not"


def test_the_same_ground_in_two_crs_is_found():
    utm31, utm32 = "EPSG:32631", "EPSG:32632"  # 6 degrees east lies on the border of both
    tiles = [(utm31, 710_000), (utm32, 285_000), (utm32, 400_000)]
    found = made(
        [(10, 0, x, 0, -10, 5_400_000) for _, x in tiles], [(2000, 2000)] * 3, [c for c, _ in tiles], [0, 1, 2]
    )
    assert list(overlapping(found)) == [(0, 1)]
    assert components(found) == [0, 0, 2]
    told = leaks(found)
    assert told == [{"splits": ("train", "val"), "pairs": 1, "example": ("0", "1")}]
