"""When trials that fail end a sweep."""

import pytest

from scalecv.search.failures import hopeless
from scalecv.search.trials import Point, Trial


def trial(number, status, epochs=0, cause=""):
    return Trial(number, {}, status, points=tuple(Point(epoch, 0.5) for epoch in range(1, epochs + 1)), cause=cause)


def failed(number, epochs=0, cause="out of memory in runs/mine-{:04d}, step 12"):
    return trial(number, "failed", epochs, cause.format(number))


@pytest.mark.parametrize(
    ("trials", "ends"),
    [
        ([], False),
        ([trial(0, "finished", 3)], False),
        ([failed(0), failed(1)], False),
        ([failed(0), failed(1), failed(2)], True),
        ([failed(0), failed(1), trial(2, "running"), failed(3)], True),
        ([failed(0), failed(1), failed(2, cause="a NaN")], False),
        ([failed(0), trial(1, "paused", 1), failed(2), failed(3)], False),
        ([trial(0, "paused", 1), trial(1, "paused", 1), failed(2, 1), failed(3, 1), failed(4, 1)], True),
        ([trial(0, "finished", 1), failed(2, 1), failed(3, 1), failed(4, 1)], False),
    ],
)
def test_three_that_fail_alike_end_a_sweep_unless_another_got_further(trials, ends):
    said = hopeless(trials, "mine")
    assert (said is not None) == ends
    if said:
        assert said.startswith("3 trials failed alike, and none got any further: out of memory in runs/mine-")
