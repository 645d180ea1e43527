"""The order of an epoch: every row once, the same for any number of ranks, stable for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalecv.batches.plan import Plan, order_hash, order_key, order_sum


def groups_of(rows: int, size: int) -> tuple[int, ...]:
    return tuple([size] * (rows // size) + ([rows % size] if rows % size else []))


def walk(plan: Plan, ranks: int, start: int = 0) -> list[tuple[int, int, int]]:
    """(position, group, row) of every valid row, checking that reads announce what picks need."""
    seen = []
    for rank in range(ranks):
        held: set[int] = set()
        for step, fetch, drop in plan.reads(start, rank, ranks):
            assert not held & set(fetch), "a row group that is still held is not fetched again"
            held |= set(fetch)
            picks = plan.picks(step, rank, ranks)
            assert set(picks.group.tolist()) <= held
            rows = zip(picks.position, picks.group, picks.row, picks.valid, strict=True)
            seen += [(int(p), int(g), int(r)) for p, g, r, valid in rows if valid]
            held -= set(drop)
    return sorted(seen)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 700),
    size=st.integers(1, 60),
    batch=st.sampled_from([4, 12, 16, 48, 64, 36, 100]),
    window=st.integers(1, 900),
    shuffle=st.booleans(),
)
def test_every_row_once_and_the_same_for_any_number_of_ranks(rows, size, batch, window, shuffle):
    plan = Plan(groups_of(rows, size), batch, "key", shuffle, window)
    once = walk(plan, 1)
    assert len({(g, r) for _, g, r in once}) == len(once) == rows
    assert sum(plan.valid_rows(step) for step in range(plan.steps)) == rows
    for ranks in (2, 4):
        assert walk(plan, ranks) == once


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch", [64, 50, 33, 25])
def test_a_batch_of_any_size_holds_a_window_and_not_the_split(batch, shuffle):
    plan = Plan(groups_of(20_000, 50), batch, "key", shuffle, 2_000)
    held, most = 0, 0
    for _, fetch, drop in plan.reads():
        held += len(fetch)
        most = max(most, held)
        held -= len(drop)
    assert most <= 2 * 2_000 // 50, "of 400"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resume_reads_on_as_if_nothing_had_happened(ranks):
    plan = Plan(groups_of(3000, 40), 32, "key", True, 600)
    whole = [row for row in walk(plan, ranks) if row[0] >= 50 * 32]
    assert walk(plan, ranks, start=50) == whole


def test_epochs_differ_and_the_order_is_frozen():
    orders = [Plan((50, 50), 10, order_key("f", "train", 0, epoch)).picks(0) for epoch in (0, 1)]
    assert not np.array_equal(orders[0].row, orders[1].row)
    # Where these numbers change, runs cannot go on: checkpoint.FORMAT changes with them.
    assert Plan((50, 50), 10, "frozen").picks(0).row.tolist() == FROZEN_WHOLE
    lanes = Plan(groups_of(400, 20), 16, "frozen", True, 100)
    assert list(zip(lanes.picks(3).group.tolist(), lanes.picks(3).row.tolist(), strict=True)) == FROZEN_LANES


def test_each_row_group_is_read_about_once_per_run():
    plan = Plan(tuple([50] * 400), 64, "key", True, 2000)
    for ranks in (1, 2, 4):
        reads = sum(len(fetch) for rank in range(ranks) for _, fetch, _ in plan.reads(0, rank, ranks))
        assert reads <= 400 + 16  # a row group on the border of two lanes may be read by both


def test_held_row_groups_do_not_grow_with_the_data():
    most = []
    for rows in (20_000, 80_000):
        plan, held, peak = Plan(groups_of(rows, 50), 64, "key", True, 2000), 0, 0
        for _, fetch, drop in plan.reads():
            held += len(fetch)
            peak = max(peak, held)
            held -= len(drop)
        most.append(peak)
    assert most[1] <= most[0] * 1.2


def test_rows_of_one_row_group_spread_over_batches():
    plan = Plan(tuple([50] * 200), 64, "key", True, 3200)
    later = plan.picks(plan.steps // 2)
    assert len(set(later.group.tolist())) >= 32, "a batch draws from many row groups"


def test_the_first_batch_needs_few_row_groups_and_later_ones_bring_no_burst():
    plan = Plan(tuple([150] * 1000), 128, "key", True, 5000)
    fetched = [len(fetch) for _, fetch, _ in plan.reads()]
    assert fetched[0] <= 2 * 16 < 5000 / 150
    assert max(fetched[1:]) <= 16 and max(fetched[40:]) <= 6, "a window has 33"


def test_filler_rows_repeat_real_ones():
    plan = Plan((10,), 16, "key")
    picks = plan.picks(0)
    assert picks.valid.sum() == 10
    assert set(picks.row[~picks.valid]) <= set(range(10))


def test_ten_million_rows_cost_little():
    plan = Plan(tuple([150] * 66_667), 128, "key", True, 8192)
    assert plan.steps == 78126
    assert len(plan.picks(70_000).row) == 128


def test_order_sum_adds_up_over_ranks_and_sees_a_swap():
    ids, at = ["a", "b", "c", "d"], np.arange(4)
    whole = order_sum(at, ids, 0)
    assert (order_sum(at[:2], ids[:2], 0) + order_sum(at[2:], ids[2:], 0)) % (1 << 256) == whole
    assert order_sum(at, ["b", "a", "c", "d"], 0) != whole
    assert order_sum(at, ids, 1) != whole
    assert len(order_hash(whole)) == 64


FROZEN_WHOLE = [31, 48, 12, 3, 23, 11, 33, 41, 17, 45]
FROZEN_LANES = [
    (19, 3),
    (5, 9),
    (8, 13),
    (12, 18),
    (16, 3),
    (15, 9),
    (2, 13),
    (6, 0),
    (3, 5),
    (13, 9),
    (17, 16),
    (7, 19),
    (14, 5),
    (9, 9),
    (11, 13),
    (1, 19),
]
