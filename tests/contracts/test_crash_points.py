"""Death at every change of storage of a run: what is left always leads to the result of the unbroken run.

PASS: the same weights, bundle and folders, and the newest complete checkpoint was the one that was taken.
"""

import collections
import os
import shutil
import tempfile

import pytest

from scalecv import storage
from scalecv.testing.crash_points import Crash, Verdict, dying_at, operations, points
from scalecv.train import checkpoint
from tests.contracts import tiny_run

MANIFEST = "/" + checkpoint.MANIFEST


def updates_of(uri: str) -> int:
    return int(uri.rpartition("checkpoints/")[2][:8])


def verdict(run: str, point, quiet) -> Verdict:
    """Die at a point, go on, and compare."""
    with dying_at(point) as done, pytest.raises(Crash):
        tiny_run.train(run)
    complete = max((updates_of(o.uri) for o in done if o.uri.endswith(MANIFEST) and o.kind == "put"), default=0)
    try:
        _, found = tiny_run.train(run)
        outcome = tiny_run.outcome(run)
    except Exception:
        return "HARD_FAIL"
    if found < complete:
        return "LOST_WORK"
    return "PASS" if outcome[:2] == quiet[:2] else "SILENT"


def test_every_point_on_local_disk(tmp_path):
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else tmp_path  # 6,000 fsyncs take long on a disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        count(lambda number: f"{folder}/{number}", least=170)


@pytest.mark.chaos
def test_every_point_on_an_object_store(s3):
    bucket = s3.bucket()
    count(lambda number: f"{bucket}/{number}", least=70)


def count(place, least):
    quiet_run = place("quiet")
    found = operations(lambda: tiny_run.train(quiet_run))
    quiet = tiny_run.outcome(quiet_run)
    told: collections.Counter[str] = collections.Counter()
    for number, point in enumerate(points(found)):
        got = verdict(place(number), point, quiet)
        told[got] += 1
        assert got == "PASS", f"{got}: {point}"
        assert tiny_run.outcome(place(number)) == quiet, f"something else is left: {point}"
        if storage.is_local(place(number)):
            shutil.rmtree(place(number))
    assert told["PASS"] >= least, told


def test_leftovers_go_and_what_may_be_under_way_stays(tmp_path):
    run = str(tmp_path)
    parts = {"model.safetensors": b"w", "resume.json": b"{}"}
    for updates in (10, 20, 30):
        checkpoint.save(run, {**parts, "n": b"%d" % updates}, updates, None)
    for name in ("00000005-deadbeef", "00000025-deadbeef", "00000040-deadbeef"):
        storage.put(storage.join(run, "checkpoints", name, "model.safetensors"), b"part")
    (tmp_path / "checkpoints/00000025-deadbeef/.part-x").write_bytes(b"torn")
    checkpoint.collect(run, keep=2)
    left = [name[:8] for name in storage.list_names(storage.join(run, "checkpoints"))]
    assert left == ["00000020", "00000030", "00000040"]


def test_a_checkpoint_of_another_format_is_refused_not_passed_over(tmp_path, monkeypatch):
    run = str(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoint.save(run, {"model.safetensors": b"w"}, 10, None)
    monkeypatch.undo()
    with pytest.raises(
        checkpoint.DataError, match=rf"format {checkpoint.FORMAT + 1}, this scalecv reads {checkpoint.FORMAT}"
    ):
        checkpoint.newest(run)
    with pytest.raises(checkpoint.DataError):
        checkpoint.collect(run, keep=1)
