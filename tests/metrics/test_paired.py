"""Effects between runs, against hand-worked cases, scipy's tests, and the metrics of training."""

import numpy as np
import pytest
import torch
from scipy import stats

from scalecv.metrics import paired
from scalecv.metrics.paired import draw, effect, holm
from scalecv.metrics.pooled import metrics_of
from scalecv.tasks import TASKS

MEAN = metrics_of("upscale", ())["psnr"]


def values(of_runs):
    """Sums whose metric is the mean over images."""
    return [np.column_stack([one, np.ones(len(one))]) for one in of_runs]


def between(a, b, **more):
    """The effect of runs [seeds, images] against others, with the same seeds."""
    seeds = ({seed: [seed] for seed in range(len(a))}, {seed: [len(a) + seed] for seed in range(len(b))})
    return effect(draw(values([*a, *b]), MEAN, **more), *seeds)


@pytest.mark.parametrize(("task", "classes"), [("classify", 2), ("classify", 4), ("segment", 2), ("segment", 5)])
def test_pooled_sums_give_the_numbers_of_training(task, classes):
    rng = np.random.default_rng(classes)
    matrix = rng.integers(0, 50, (classes, classes))
    matrix[-1] = matrix[:, -1] = 0 if classes > 2 else matrix[-1]
    names = [f"c{at}" for at in range(classes)]
    told = TASKS[task].summarise({"confusion": torch.from_numpy(matrix)}, names)
    sums = np.concatenate([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]).astype(float)
    found = metrics_of(task, names)
    assert {name: float(measure(sums)) for name, measure in found.items()} == pytest.approx(
        {name: told[name] for name in found}
    )
    assert TASKS[task].headline in found
    several = found["f1"](np.stack([sums, 0 * sums]))
    assert several.tolist() == [found["f1"](sums), 0.0]


def test_one_seed_each_is_the_paired_t_test_over_images():
    rng = np.random.default_rng(0)
    a = rng.normal(30, 4, 400)
    b = a + rng.normal(0.1, 1, 400)
    found, known = between([a], [b]), stats.ttest_rel(b, a)
    low, high = known.confidence_interval()
    assert found.value == pytest.approx((b - a).mean()) and not found.covers_seeds and not found.is_paired
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.p == pytest.approx(known.pvalue, rel=0.25)
    assert found.detectable == pytest.approx(2.8 / 20, rel=0.1), "of a standard deviation of 1 and 400 images"
    reverse = between([b], [a])
    assert (reverse.value, reverse.low, reverse.p) == pytest.approx((-found.value, -found.high, found.p))


def test_seeds_are_a_t_test_where_images_say_nothing():
    a, b = np.array([0.70, 0.72, 0.71]), np.array([0.74, 0.75, 0.73])
    flat = [np.repeat(side[:, None], 50, 1) for side in (a, b)]
    found, known = between(*flat), stats.ttest_rel(b, a)
    assert found.covers_seeds and found.is_paired and found.seeds == (3, 3)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))
    assert found.p == pytest.approx(known.pvalue)
    drawn = draw(values([*flat[0], *flat[1]]), MEAN)
    other = effect(drawn, {0: [0], 1: [1], 2: [2]}, {7: [3], 8: [4], 9: [5]})
    half = stats.t(2).isf(0.025) * np.hypot(a.std(ddof=1), b.std(ddof=1)) / 3**0.5
    assert not other.is_paired and other.high - other.value == pytest.approx(half)
    one = effect(drawn, {0: [0], 1: [1], 2: [2]}, {0: [3]})
    assert one.covers_seeds and one.high - one.value == pytest.approx(
        stats.t(2).isf(0.025) * a.std(ddof=1) * (4 / 3) ** 0.5
    )
    twice = effect(drawn, {0: [0, 1], 1: [2]}, {0: [3, 4], 1: [5]})
    assert twice.value == pytest.approx(np.mean([b[:2].mean(), b[2]]) - np.mean([a[:2].mean(), a[2]]))


def test_a_difference_that_few_images_carry_needs_more_of_them():
    a = np.zeros(500)
    for count, is_told in ((4, False), (5, False), (8, True)):  # all on one side by chance: 2 / 2^count
        b = np.where(np.arange(500) < count, 1.0, 0.0)
        assert (between([a], [b]).p <= 0.05) is is_told
    same = between([a], [a])
    assert (same.value, same.low, same.high, same.p, same.detectable) == (0, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="5 images, at least 6"):
        between([a[:5]], [a[:5]])


def test_tiles_of_a_scene_are_drawn_together():
    rng = np.random.default_rng(1)
    scenes = rng.normal(0.2, 1, 40)
    tiles, of = np.repeat(scenes, 25), np.repeat(np.arange(40), 25)
    alone, together = between([0 * scenes], [scenes]), between([0 * tiles], [tiles], scenes=of.tolist())
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    wrong = between([0 * tiles], [tiles])
    assert wrong.high - wrong.low < (together.high - together.low) / 4


def test_many_images_are_drawn_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    a = rng.normal(0, 1, 3 * 997)
    one = between([0 * a], [a])
    monkeypatch.setattr(paired, "MOST_UNITS", 997)
    parts = between([0 * a], [a])
    assert parts.value == pytest.approx(one.value)
    assert parts.high - parts.low == pytest.approx(one.high - one.low, rel=0.1)


def test_equal_configurations_are_seldom_told_apart():
    """Of 200 pairs with seeds that differ more than images do, 10 are expected; 20 have a chance of less than 1 %."""
    told = 0
    for pair in range(200):
        rng = np.random.default_rng(pair)
        runs = rng.normal(size=60) + 0.7 * rng.normal(size=(6, 60)) + 0.3 * rng.normal(size=(6, 1))
        told += between(runs[:3], runs[3:]).p <= 0.05
    assert told < 20


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([0.02]) == [0.02]
