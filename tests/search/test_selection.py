"""Which members are chosen, and how far a gain is trusted: by hand, and against all that could be chosen."""

from itertools import product

import numpy as np
import pytest

from scalecv.search.selection import interval, select


def accuracy(answers, truth):
    """A score of counts: how often the mean probability, [candidates, rows], is on the right side of a half."""

    def score(counts):
        mean = np.average(answers, axis=0, weights=counts)
        return float(((mean >= 0.5) == truth).mean())

    return score


def test_members_that_err_on_other_rows_are_chosen_and_the_copy_is_not():
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    a = np.array([0.9, 0.9, 0.9, 0.4, 0.1, 0.1, 0.1, 0.1])
    b = np.array([0.4, 0.4, 0.9, 0.9, 0.1, 0.1, 0.1, 0.4])
    score = accuracy(np.stack([a, a, b]), truth)
    assert score((1, 0, 0)) == 7 / 8 and score((1, 0, 1)) == 1
    assert select(score, [1.0, 1.0, 1.0], 10.0, 5) == ((1, 0, 1), 1.0)


def test_the_best_single_stays_alone_where_nothing_is_better():
    score = accuracy(np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([True, False]))
    assert select(score, [1.0, 1.0], 10.0, 5) == ((1, 0), 1.0)


def test_of_equal_ones_the_cheaper_is_drawn():
    assert select(lambda counts: 0.5, [3.0, 1.0, 2.0], 10.0, 5) == ((0, 1, 0), 0.5)


@pytest.mark.parametrize(("budget", "most"), [(2.5, 5), (10.0, 2)])
def test_members_cost_once_and_are_no_more_than_asked_for(budget, most):
    wanted = np.array([0.5, 0.3, 0.2])

    def score(counts):
        return -float(np.abs(np.array(counts) / sum(counts) - wanted).sum())

    counts, found = select(score, [1.0, 1.0, 1.0], budget, most)
    assert sum(count > 0 for count in counts) == 2 and counts[2] == 0 and counts[0] > counts[1]
    assert found > score((1, 0, 0))
    counts, _ = select(score, [1.0, 1.0, 1.0], 3.0, 3)
    np.testing.assert_allclose(np.array(counts) / sum(counts), wanted, atol=0.05)


def test_nothing_that_fits_is_none():
    assert select(lambda counts: 1.0, [3.0, 4.0], 2.0, 5) is None


def test_it_comes_near_the_best_of_all_means():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.5
    answers = np.clip(np.where(truth, 0.6, 0.4) + rng.normal(0, 0.25, (4, 300)), 0, 1)
    score = accuracy(answers, truth)
    best = max(score(counts) for counts in product(range(4), repeat=4) if any(counts))
    _, found = select(score, [1.0] * 4, 100.0, 4)
    assert max(score(tuple(np.eye(4, dtype=int)[at])) for at in range(4)) < found <= 1 and found >= best - 0.01


def test_the_interval_is_that_of_the_normal_distribution():
    gains = np.random.default_rng(1).normal(0.1, 1.0, 400)
    low, high = interval(lambda rows: float(gains[rows].mean()), 400)
    error = gains.std() / 20
    assert (low, high) == pytest.approx((gains.mean() - 1.96 * error, gains.mean() + 1.96 * error), abs=0.15 * error)
    assert interval(lambda rows: 0.0, 400) == (0.0, 0.0)


def test_equal_models_are_seldom_told_apart():
    told = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pairs = rng.choice([-1.0, 0.0, 1.0], 150, p=[0.1, 0.8, 0.1])
        told += interval(lambda rows, pairs=pairs: float(pairs[rows].mean()), 150, seed)[0] > 0
    assert told <= 4


def test_in_twenty_sweeps_what_is_proposed_holds_on_rows_that_nobody_saw():
    proposed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows, models = 3000, 6
        truth = rng.random(rows) < 0.5
        shared, own = rng.normal(0, 1.0, rows), rng.normal(0, rng.uniform(0.2, 1.2, (models, 1)), (models, rows))
        answers = 1 / (1 + np.exp(-(np.where(truth, 1.2, -1.2) + shared + own)))
        choose, check, fresh = slice(0, 300), slice(300, 600), slice(600, None)
        score = accuracy(answers[:, choose], truth[choose])
        singles = np.eye(models, dtype=int)
        best = max(range(models), key=lambda at: score(tuple(singles[at])))
        counts, _ = select(score, [1.0] * models, 100.0, 5)
        right = [(np.average(answers, axis=0, weights=of) >= 0.5) == truth for of in (counts, singles[best])]
        gains = right[0].astype(float) - right[1]
        checked = gains[check]
        low, _ = interval(lambda at, checked=checked: float(checked[at].mean()), 300, seed)
        if low > 0:
            proposed += 1
            error = gains[fresh].std() / np.sqrt(rows - 600)
            assert gains[fresh].mean() > -2 * error, seed
    assert proposed >= 3
