"""Epoch after epoch without a gap, and the same batches as one by one."""

import threading
import time

import pytest
import torch

from scalecv.batches import samples
from scalecv.batches.epoch import BATCHES_AHEAD
from scalecv.batches.feed import threads_per_rank
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


@pytest.fixture
def decoders(monkeypatch):
    """The thread of each image that was decoded so far, in a list; and how long an image takes more, in another."""
    threads, longer_s, sample = [], [0.0], samples.sample

    def seen(*args):
        time.sleep(longer_s[0])
        made = sample(*args)
        threads.append(threading.current_thread())
        return made

    monkeypatch.setattr(samples, "sample", seen)
    return threads, longer_s


def test_batches_are_decoded_beside_the_step_that_takes_the_one_before(whole, decoders):  # noqa: F811
    """With nothing set there is at least one thread for it."""
    threads, _ = decoders
    one = feed(open_dataset(whole), threads=threads_per_rank(None, 10_000))
    batches = iter(one.epoch(0))
    next(batches)
    until = time.monotonic() + 10
    while len(threads) < (1 + BATCHES_AHEAD) * one.batch and time.monotonic() < until:
        time.sleep(0.01)
    assert len(threads) >= (1 + BATCHES_AHEAD) * one.batch, "the step takes its time, and asks for nothing"
    assert threading.current_thread() not in threads
    batches.close()


def test_waiting_for_a_batch_is_counted_and_the_step_itself_is_not(whole, decoders):  # noqa: F811
    _, longer_s = decoders
    one = feed(open_dataset(whole))
    for image_s, step_s, least, most in ((0.004, 0.0, 0.6, 1.01), (0.0, 0.05, 0.0, 0.8)):
        longer_s[0] = image_s
        epoch = one.epoch(0)
        batches = iter(epoch)
        next(batches)
        began, before = time.perf_counter(), epoch.wait_s
        for _ in batches:
            time.sleep(step_s)
        assert least < (epoch.wait_s - before) / (time.perf_counter() - began) < most
