"""How a unit reads and examines: turns, reads at the same time, and no more than that in memory."""

import json
import subprocess
import sys
import threading
import time
import tracemalloc

import PIL.Image

from scalecv import storage
from scalecv.shards import dispatch, plan, unit
from scalecv.shards.decode import BadImage
from scalecv.shards.examine import examine
from scalecv.shards.examiner import TOGETHER, Examiner, turns
from scalecv.sources.found import Found
from scalecv.testing.servers import S3Server
from scalecv.testing.store_proxy import Faults, StoreProxy
from tests.shards.images import class_folders, encoded, png

SETTINGS = plan.UnitSettings("source", "label", (), (), None, 1 << 20)


def row(path: str, data: bytes) -> dict:
    return {"path": path, "size": len(data), "mask": None, "mask_size": 0, "problem": None}


def test_samples_of_one_turn_are_judged_one_by_one():
    samples = [(f"{i}.png", png(i), None) for i in range(2 * TOGETHER + 3)]
    samples[5] = ("5.png", b"no image", None)
    samples[70] = ("70.png", samples[70][1][:40], None)
    child = Examiner()
    answers = list(child.examine_all(samples))
    child.close()
    assert len(answers) == len(samples)
    assert [i for i, answer in enumerate(answers) if isinstance(answer, BadImage)] == [5, 70]
    assert answers[66] == json.loads(json.dumps(examine(*samples[66])))


def test_a_slow_sample_takes_none_of_its_turn_with_it():
    slow = encoded(PIL.Image.new("RGB", (7000, 7000)), "PNG", compress_level=1)
    child = Examiner(timeout_s=0.2)
    answers = list(child.examine_all([("a.png", png(1), None), ("b.png", slow, None), ("c.png", png(2), None)]))
    child.close()
    reasons = [answer.reason if isinstance(answer, BadImage) else None for answer in answers]
    assert reasons == [None, "timeout", None]


def test_large_jpegs_are_sampled_and_all_else_is_counted():
    photo = PIL.Image.effect_noise((600, 400), 60).convert("RGB")
    whole = examine("a.png", encoded(photo, "PNG"))
    some = examine("a.jpg", encoded(photo, "JPEG", quality=100, subsampling=0))
    assert whole["pixels"] == 240_000 and 50_000 <= some["pixels"] <= 80_000
    # The standard error of the mean of so many pixels is 0.6.
    assert all(abs(a - b) < 3 for a, b in zip(whole["mean"], some["mean"], strict=True))
    lonely = PIL.Image.new("RGB", (600, 400), (9, 9, 9))
    assert set(examine("a.jpg", encoded(lonely, "JPEG"))["notes"]) == {"constant"}
    lonely.paste((250, 250, 250), (0, 5, 600, 11))  # between the rows that are counted
    assert "constant" not in examine("a.jpg", encoded(lonely, "JPEG", quality=100))["notes"]


def test_a_jpeg_that_libjpeg_warns_of_gets_a_note():
    photo = PIL.Image.effect_noise((160, 120), 30).convert("RGB")
    data = bytearray(encoded(photo, "JPEG", quality=90))
    middle = len(data) // 2
    data[middle : middle + 4] = b"\x5a\xa5\x11\x77"
    facts = examine("a.jpg", bytes(data))
    assert set(facts["notes"]) & {"jpeg_colors", "jpeg_warned"}


def test_a_late_store_is_asked_for_many_objects_at_once(s3: S3Server, monkeypatch):
    data = png(0)
    source = f"{s3.bucket()}/late"
    rows = [row(f"{i}.png", data) for i in range(128)]
    for one in rows:
        storage.put(f"{source}/{one['path']}", data)
    with StoreProxy(s3.endpoint, Faults(latency_s=0.05)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        began = time.perf_counter()
        assert storage.get(f"{source}/0.png") == data
        alone_s = time.perf_counter() - began
        began = time.perf_counter()
        got = [found for some in unit._fetched(source, rows) for _, found, _ in some]
        together_s = time.perf_counter() - began
    assert got == [data] * len(rows)
    assert alone_s > 0.05 and together_s < len(rows) * 0.05 / 8, "128 reads take 6.4 s one by one"


def test_the_plan_of_many_rows_lies_on_disk():
    peaks = []
    for rows in (2_000, 10_000):
        tracemalloc.start()
        found = (Found(f"{i:06d}.png", 60_000, "e", "a") for i in range(rows))
        collected = plan.collect(found)
        plan.assign_splits(collected, (1.0, 0.0, 0.0), True)
        assert sum(one.rows for one in plan.units(collected, SETTINGS, 8)) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


_COMMAND = """
import json, sys
from scalecv.shards.ingest import IngestOptions, ingest
done = ingest(IngestOptions(source=sys.argv[1], to=sys.argv[2], layout="imagefolder"))
print(json.dumps([done.fingerprint, "ray" in sys.modules]))
"""


def test_a_small_source_needs_no_ray(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    source = class_folders(tmp_path / "source")
    command = [sys.executable, "-c", _COMMAND, str(source), str(tmp_path / "ds")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)[1] is False
    assert not dispatch._is_small(dispatch.HERE_ROWS + 1, 0) and not dispatch._is_small(1, dispatch.HERE_BYTES + 1)


def test_runs_of_rows_are_bounded():
    rows = [row(f"{i}.png", bytes(size)) for i, size in enumerate([10] * 200 + [3 << 20, 10, 10])]
    sizes = [len(some) for some in turns(rows, unit._size)]
    assert sizes == [64, 64, 64, 8, 1, 2]


def test_a_file_that_cannot_be_read_is_set_aside(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert unit._object(str(tmp_path), "folder.png", 10).reason == "unreadable"
    assert unit._object(str(tmp_path), "x" * 300, 10).reason == "unreadable"


def test_a_slow_disk_is_read_by_more_threads(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "source", classes=1, each=600)
    rows = [row(f"class0/{i:04d}.png", (source / f"class0/{i:04d}.png").read_bytes()) for i in range(600)]
    read, most = storage.get, [0, 0]
    lock = threading.Lock()

    def slow(*args):
        with lock:
            most[0] += 1
            most[1] = max(most)
        time.sleep(0.01)
        try:
            return read(*args)
        finally:
            with lock:
                most[0] -= 1

    assert len([one for some in unit._fetched(str(source), rows) for one in some]) == 600
    monkeypatch.setattr(storage, "get", slow)
    for _ in range(2):
        fetched = [one[0]["path"] for some in unit._fetched(str(source), rows) for one in some]
        assert fetched == [one["path"] for one in rows]
    assert most[1] >= 16 and unit._readers.pop(str(source)) == 32
