"""Whoever decodes, the batches are the same; and a batch that does not come back is decoded here."""

import time

import pytest
import ray
import torch

from scalecv.batches import decoders
from scalecv.batches.decoders import Decoders, Shared
from scalecv.errors import IntegrityError
from tests.batches.test_collate import pixels, rows

HOW = pixels(resized_crop=(0.2, 1.0), hflip=0.5)


def equal(one, other):
    assert one.keys() == other.keys() and one["id"] == other["id"]
    assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    assert one["image"].is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def threads():
    made = Decoders(HOW, 2, "trainer", 1, Shared())
    yield made
    made.close()


def test_without_a_cluster_the_threads_decode(threads, monkeypatch):
    monkeypatch.setattr(decoders, "free_cpus", lambda: 0)  # another test may have left a cluster
    alone = Decoders(HOW, 2, "cluster", 1, Shared())
    said = "data.decode=cluster: no CPU of the cluster is free, 2 threads decode here"
    assert (alone.helpers, alone.notes) == (0, [said])
    equal(alone.start(rows(), (3, 1)).wait()[0], threads.start(rows(), (3, 1)).wait()[0])
    alone.close()


def ready(made, count):
    """Wait until processes of the cluster have imported what they need."""
    until = time.monotonic() + 120
    while made.helpers < count and time.monotonic() < until:
        time.sleep(0.05)
    return made.helpers


def test_the_cluster_is_asked_once_training_waits(ray_local, monkeypatch):
    monkeypatch.setattr(decoders, "LOOK_S", 0.0)
    shared = Shared()
    watched = Decoders(HOW, 1, "auto", 2, shared)
    for _ in range(decoders.LOOK_BATCHES):
        watched.waited(0.0)
    assert not shared.is_asked
    for _ in range(decoders.LOOK_BATCHES):
        watched.waited(0.1)
    assert "training waited" in watched.notes[0] and "1 free CPUs" in watched.notes[0]  # its share of two
    later = Decoders(HOW, 1, "auto", 2, shared)
    assert (ready(later, 1), later.notes) == (1, [])
    for one in (watched, later):
        one.close()


def test_a_process_that_answers_twice_is_one_helper(ray_local):
    while decoders.free_cpus() < 2:
        time.sleep(0.05)
    busy = ray.remote(num_cpus=1)(lambda: time.sleep(600)).remote()
    while decoders.free_cpus() > 1:
        time.sleep(0.05)
    shared = Shared()
    shared.ask(2)
    until = time.monotonic() + 60
    while not shared.helpers() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)  # for the second answer, which comes from the same process
    assert shared.helpers() == 1
    ray.cancel(busy, force=True)
    while shared.helpers() < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert shared.helpers() == 2


def test_processes_that_cannot_get_ready_are_told_of_and_asked_ever_more_seldom(ray_local, threads, monkeypatch):
    def refuse():
        raise OSError("no decoder here")

    monkeypatch.setattr(decoders, "_ready", refuse)
    monkeypatch.setattr(decoders, "ASK_AGAIN_S", 0.01)
    while not decoders.free_cpus():
        time.sleep(0.05)
    made = Decoders(HOW, 1, "cluster", 1, Shared())
    until = time.monotonic() + 60
    while made.shared._in_vain < 3 and time.monotonic() < until:
        assert made.helpers == 0
        time.sleep(0.01)
    assert made.shared._in_vain == 3
    for _ in range(2):
        equal(made.start(rows(), (3, 1)).wait()[0], threads.start(rows(), (3, 1)).wait()[0])
    (told,) = [note for note in made.notes if "could not get ready" in note]
    assert told.endswith("OSError: no decoder here")
    made.close()


def test_tasks_decode_what_threads_would(ray_local, threads, monkeypatch):
    while decoders.free_cpus() < 2:  # those of another test come back a little later
        time.sleep(0.05)
    made = Decoders(HOW, 1, "cluster", 1, Shared())
    assert ready(made, 2) == 2 and "2 free CPUs" in made.notes[0]
    expected = threads.start(rows(), (3, 1)).wait()[0]
    monkeypatch.setattr(decoders, "LOCAL_BATCHES", 0)
    for batch, took in [pending.wait() for pending in [made.start(rows(), (3, 1)) for _ in range(2)]]:
        equal(batch, expected)
        assert took > 0
    assert made.given_away == 2
    broken = rows()
    broken[5] = type(broken[5])("bad", "bad.x", "here", b"\xff\xd8\xff", None, None, "a")
    with pytest.raises(IntegrityError, match="row bad"):
        made.start(broken, (3, 1)).wait()

    # Every CPU is taken: what was given away is decoded here.
    monkeypatch.setattr(decoders, "PATIENCE_S", 0.2)
    busy = [ray.remote(num_cpus=1)(lambda: time.sleep(600)).remote() for _ in range(2)]
    while decoders.free_cpus():
        time.sleep(0.05)
    equal(made.start(rows(), (3, 1)).wait()[0], expected)
    assert made.given_away == 2 and made.helpers == 0  # nobody answers, so no batch is given away and waited for
    for task in busy:
        ray.cancel(task, force=True)
    assert ready(made, 2) == 2
    made.close()
