"""The process that decodes, as one that a hostile image has taken over would behave."""

import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from scalecv.errors import ScalecvError
from scalecv.raster import PIXELS, Profile
from scalecv.shards import examiner
from scalecv.shards.child import Child
from scalecv.shards.decode import BadImage
from scalecv.shards.examine import examine
from scalecv.shards.examiner import TOGETHER_BYTES, Examiner
from scalecv.shards.scene import SceneReader
from scalecv.tiles import Window
from tests.shards.images import png

HOSTILE = """
import mmap, os, time
from scalecv.shards.child import allow, reply, serving
def answers(line):
    def serve(*shared):
        source, target = serving()
        source.readline()
        target.write(line)
        target.flush()
        time.sleep(60)
    return serve
text, deep = answers(b"no JSON\\n"), answers(b"[" * 200_000 + b"\\n")
none, other, lacking = answers(b"[]\\n"), answers(b'{"answers": 3}\\n'), answers(b'[{"width": 3}]\\n')
square = answers(b"[[40, 40, 1600, 1000000, 0, 0, 255]]\\n")
def endless(*shared):
    source, target = serving()
    source.readline()
    while True:
        target.write(b"x" * (1 << 20))
def deaf(*shared):
    serving()
    time.sleep(60)
def spins(*shared):
    source, _ = serving()
    source.readline()
    allow(0.5)
    while True:
        pass
def shrinks(shared):
    source, target = serving()
    source.readline()
    said = []
    for attempt in (lambda: os.ftruncate(shared, 0), lambda: os.pwrite(shared, b"x", 0), lambda: mmap.mmap(shared, 0)):
        try:
            attempt()
            said.append("done")
        except OSError:
            said.append("refused")
    reply(target, [{"reason": "damaged", "detail": " ".join(said)}])
    source.readline()
def torn():
    source, target = serving()
    source.readline()
    profile = dict(width=8, height=8, bands=1, dtype="uint8", nodata=None, wkt=None, transform=PIXELS, crs=None)
    reply(target, {"profile": {**profile, "block_px": [8, 8], "names": []}, "is_raster": True})
    source.readline()
    reply(target, {"shape": [8, 8, 1], "dtype": "|u1"}, b"x" * 20)
    os._exit(9)
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A function that gives one end of a child that a function above stands for."""
    (tmp_path / "hostile.py").write_text(HOSTILE.replace("PIXELS", repr(tuple(PIXELS))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    children = []

    def make(name: str, shared_bytes: int = TOGETHER_BYTES) -> Child:
        children.append(Child(f"hostile:{name}", shared_bytes))
        return children[-1]

    yield make
    for child in children:
        child.close()


LIES: tuple[dict[str, Any] | list[int], ...] = (
    [8, 8, 64, 1, 2],
    [-8, 8, 64, 64, 64, 1, 1],
    [10**30, 8, 64, 64, 64, 1, 1],
    [40, 40, 1600, 1_000_000, 0, 0, 255],
    [40, 40, 1600, 1600, 1600, 0, 256],
    [40, 40, 1600, 1600, 1600, 2, 255],
    {"width": 1 << 40},
    {"bands": 2},
    {"mean": [1.0, 1.0]},
    {"m2": [-5.0] * 3},
    {"mean": [math.nan] * 3},
    {"mean": [math.inf] * 3},
    {"m2": [1.7e308] * 3},
    {"max": [1e300] * 3},
    {"min": [200.0] * 3, "max": [3.0] * 3},
    {"format": "XYZ"},
    {"dtype": "foo"},
    {"dtype": "object"},
    {"mask_values": {"1": 10**9}},
    {"mask_values": {"1": -4}},
    {"mask_values": {str(10**30): 1}},
    {"mask_values": {"one": 1}},
)
"""What no image has: in numbers, or beside the facts of a real one."""


@pytest.mark.parametrize("lie", LIES)
def test_facts_that_no_image_has_are_no_answer(lie):
    """They would be in the record of a unit, and end each further ingest of this source."""
    real = examine("a.png", png(1))
    told = [real, [8, 8, 64, 64, 64, 1, 1], lie if isinstance(lie, list) else real | lie]
    good, plain, answer = examiner._answers().validate_json(json.dumps(told))
    assert examiner._read(good) == real and examiner._read(plain)["mean"] == [1.0]
    with pytest.raises((ValueError, TypeError)):
        examiner._read(answer)


@pytest.mark.parametrize("name", ["text", "deep", "none", "other", "lacking", "endless", "square"])
def test_an_answer_that_is_none_is_the_death_of_the_decoder(hostile, name):
    examiner = Examiner()
    examiner._child = hostile(name)
    found = examiner.examine_all([("a.png", png(1), None)])
    assert [one.reason for one in found] == ["decoder_died"]
    found = [*examiner.examine_all([("a.png", png(1), None), ("b.png", png(2), None)])]
    assert [one.reason for one in found] == ["decoder_died"] * 2


def test_a_decoder_that_takes_nothing_is_stopped(hostile):
    examiner = Examiner(timeout_s=1.0)
    examiner._child = hostile("deaf")
    with pytest.raises(BadImage) as caught:
        examiner.examine("a.png", os.urandom(3 << 20))
    assert caught.value.reason == "timeout"


def test_a_decoder_that_never_ends_is_ended_by_the_kernel(hostile):
    examiner = Examiner()
    examiner._child = hostile("spins")
    with pytest.raises(BadImage, match="signal 24"):
        examiner.examine("a.png", png(1))


def test_the_decoder_can_only_read_the_memory_that_it_is_given(hostile):
    examiner = Examiner()
    examiner._child = hostile("shrinks")
    with pytest.raises(BadImage, match="refused refused refused"):
        examiner.examine("a.png", png(1))


def test_a_turn_that_is_interrupted_leaves_no_answer_for_the_next():
    examiner = Examiner()
    examiner.examine("a.png", png(1))
    with pytest.raises(KeyboardInterrupt), examiner._child.turn():
        examiner._child.share([png(1, (30, 30))])
        lengths = [("b.png", len(png(1, (30, 30))), None)]
        examiner._child.send({"samples": lengths, "declared": [], "ignore": None, "shared": True})
        raise KeyboardInterrupt
    assert examiner.examine("c.png", png(1, (40, 20)))["width"] == 40
    examiner.close()


def test_a_decoder_that_dies_while_it_sends_pixels_is_that_scenes_own(hostile):
    reader = SceneReader()
    reader._child = hostile("torn", 0)
    profile = reader.open("nowhere.tif", 100)
    assert isinstance(profile, Profile) and profile.block_px == (8, 8)
    with pytest.raises(BadImage, match="exit code 9") as caught:
        reader.read(Window(0, 0, 8, 8))
    assert caught.value.reason == "decoder_died"


def test_modules_that_lie_among_the_images_are_not_imported(tmp_path, monkeypatch):
    for name in ("json", "numpy", "simplejpeg", "scalecv"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as Ray does in its workers
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:.")
    examiner = Examiner()
    assert examiner.examine("a.png", png(1))["width"]
    examiner.close()
    assert not (tmp_path / "imported").exists()


def test_a_decoder_that_does_not_start_is_one_error_and_no_reason_to_set_images_aside():
    with pytest.raises(ScalecvError, match=r"did not start \(ended with exit code 1\)"):
        Child("scalecv.shards.nowhere:serve").send({})


@pytest.mark.parametrize("refusal", [None, PermissionError(1, "Operation not permitted")])
def test_samples_come_by_shared_memory_or_by_pipe(monkeypatch, refusal):
    samples = [(f"{number}.png", png(number, (64, 64)), None) for number in range(5)]
    large = ("large.png", png(9, (900, 900)), png(9, (900, 900), "L"))
    assert len(large[1]) > TOGETHER_BYTES
    handles = len(os.listdir("/proc/self/fd"))
    shared, by_pipe = Examiner(), Examiner()
    found = [*shared.examine_all([*samples, large])]

    def refuses(*_: object) -> int:
        raise refusal

    if refusal:
        monkeypatch.setattr("os.memfd_create", refuses)
    else:
        monkeypatch.delattr("os.memfd_create")
    assert found == [*by_pipe.examine_all([*samples, large])]
    assert [one["width"] for one in found] == [64] * 5 + [900]
    assert shared._child._shared is not None and by_pipe._child._shared is None
    shared.close()
    by_pipe.close()
    assert len(os.listdir("/proc/self/fd")) == handles
    assert np.isfinite(found[0]["mean"]).all()


@pytest.mark.parametrize("module", ["examiner", "scene"])
def test_the_process_that_decodes_imports_no_more_than_it_needs(module):
    """It starts with each ingest, and whatever it imports lies beside what strangers sent."""
    needless = "{'pydantic', 'torch', 'ray', 'obstore', 'scalecv.config'}"
    asked = f"import sys, scalecv.shards.{module}; print(*{needless} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-P", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
