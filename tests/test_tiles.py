from itertools import pairwise

import numpy as np
import pytest

from scalecv.tiles import Window, grid, starts, stitch, weights

SIZES = [(100, 70, 32, 8), (64, 64, 64, 16), (65, 33, 32, 15), (20, 90, 32, 0), (1, 1, 8, 4), (97, 97, 16, 12)]


@pytest.mark.parametrize(("width", "height", "size", "overlap"), SIZES)
def test_windows_cover_everything_and_overlap_as_asked(width, height, size, overlap):
    seen = np.zeros((height, width), int)
    windows = list(grid(width, height, size, overlap))
    assert windows == sorted(set(windows))
    for w in windows:
        assert (w.height, w.width) == (min(size, height), min(size, width))
        assert 0 <= w.row <= height - w.height and 0 <= w.col <= width - w.width
        seen[w.row : w.row + w.height, w.col : w.col + w.width] += 1
        assert Window.parse(str(w)) == w
    assert seen.min() >= 1
    for length in (width, height):
        places = starts(length, size, overlap)
        assert all(b - a <= size - overlap for a, b in pairwise(places))


def test_no_more_than_the_overlap_is_taken_twice_but_in_the_last_window():
    assert starts(448, 256, 64) == [0, 192] and starts(449, 256, 64) == [0, 192, 193] and starts(256, 256, 64) == [0]


@pytest.mark.parametrize(("width", "height", "size", "overlap"), SIZES)
def test_stitching_what_was_cut_gives_the_whole(width, height, size, overlap):
    whole = np.random.default_rng(0).normal(size=(3, height, width)).astype(np.float32)
    parts = [
        (w, whole[:, w.row : w.row + w.height, w.col : w.col + w.width]) for w in grid(width, height, size, overlap)
    ]
    rows = list(stitch(parts, width, height, overlap))
    assert [top for top, _ in rows] == np.cumsum([0, *(r.shape[1] for _, r in rows[:-1])]).tolist()
    np.testing.assert_allclose(np.concatenate([r for _, r in rows], axis=1), whole, atol=1e-6)


def test_weights_leave_out_the_outer_quarter_and_rise_evenly_to_one():
    w = weights(Window(10, 0, 32, 32), 100, 100, 16)
    assert w.shape == (32, 32) and w[16, 0] == 1, "the scene's own edge counts in full"
    np.testing.assert_allclose(
        w[:, 8], [0] * 4 + list((np.arange(8) + 0.5) / 8) + [1] * 8 + list((7.5 - np.arange(8)) / 8) + [0] * 4
    )
    assert w[16, -4:].max() == 0 and w[16, -13] == 1
