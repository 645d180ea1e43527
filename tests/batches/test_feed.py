"""Epoch after epoch without a gap, and the same batches as one by one."""

import threading
import time

import torch

from scalecv.shards.store import open_dataset
from tests.batches.test_feed_damage import feed, whole  # noqa: F401 - a fixture


def taken(epoch):
    return [(step, batch["id"], batch["image"]) for step, batch in epoch]


def running():
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("feed-")}


def test_epochs_in_a_row_are_the_epochs_one_by_one(whole):  # noqa: F811
    one = feed(open_dataset(whole))
    with one.epochs(2, 1, 5) as epochs:
        rows = [taken(epoch) for epoch in epochs]
    alone = [taken(one.epoch(2, 1)), taken(one.epoch(3)), taken(one.epoch(4))]
    assert [[(step, ids) for step, ids, _ in epoch] for epoch in rows] == [
        [(step, ids) for step, ids, _ in epoch] for epoch in alone
    ]
    assert all(torch.equal(a[2], b[2]) for x, y in zip(rows, alone, strict=True) for a, b in zip(x, y, strict=True))
    assert not running()


def test_the_next_epoch_is_under_way_before_this_one_ends_and_ends_with_the_run(whole):  # noqa: F811
    one = feed(open_dataset(whole))
    with one.epochs(0, 0, 9) as epochs:
        epoch = next(epochs)
        batches = iter(epoch)
        for _ in range(epoch.plan.steps - 2):
            next(batches)
        until = time.monotonic() + 10
        while "feed-train-1" not in running() and time.monotonic() < until:
            time.sleep(0.01)
        assert "feed-train-1" in running()
    batches.close()
    assert not running()


def test_the_last_epoch_has_no_next(whole):  # noqa: F811
    one = feed(open_dataset(whole))
    with one.epochs(0, 0, 1) as epochs:
        assert len([taken(epoch) for epoch in epochs]) == 1
        assert not running()
