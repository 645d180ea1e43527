"""The side-by-side benchmark's own parts: its images, its limit, how it counts, and scalecv's row; no peers."""

import argparse
import io
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from scalecv.shards.ingest import IngestOptions, ingest
from tests.reference.feeds import formats, limit, processes, row, scalecv_feed
from tests.reference.feeds.report import report
from tests.reference.feeds.work import SIDE, Store, Work, draw_box, work_of

IMAGES = 64


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feeds")
    formats.write_formats(folder, IMAGES, {"packed"}, 2)
    source, to = str(folder / "files"), str(folder / "dataset")
    ingest(IngestOptions(source=source, to=to, layout="imagefolder", concurrency=0))
    return Work(str(folder), IMAGES, batch=24, workers=2)


def test_files_are_like_photographs_and_all_different(work):
    files = [open(f"{work.place('files/train')}/{name}", "rb").read() for name in work.names("files/train", "*.jpg")]
    assert len(set(files)) == IMAGES
    assert 20_000 < np.mean([len(data) for data in files]) < 34_000
    assert all(240 < min(Image.open(io.BytesIO(data)).size) < 270 for data in files)


def test_scalecv_gives_each_image_once_in_each_epoch(work):
    epochs = scalecv_feed.open_feed(work)
    for number in (0, 1):
        told = row.take(epochs, work, number, None)
        assert 0 < told["first_s"] <= told["wall_s"] and told["cpu_s"] >= 0


def test_a_row_that_loses_or_repeats_an_image_fails(work):
    pixels = np.zeros((IMAGES, SIDE, SIDE, 3), np.uint8)
    twice = [0, *range(IMAGES - 1)]
    with pytest.raises(RuntimeError, match="64 images came, 63 different"):
        row.take(lambda epoch: iter([(pixels, twice)]), work, 0, None)
    with pytest.raises(RuntimeError, match="float32"):
        row.take(lambda epoch: iter([(pixels.astype(np.float32), range(IMAGES))]), work, 0, None)


def test_a_consumer_s_sleep_counts_as_busy(work):
    def slow(epoch):
        time.sleep(0.1)
        yield np.zeros((IMAGES, SIDE, SIDE, 3), np.uint8), range(IMAGES)

    told = row.take(slow, work, 0, rate=IMAGES / 0.1)
    assert 0.35 < told["busy"] < 0.6


def test_the_limit_s_pixels_are_pillow_s_within_one_step(work):
    """Where it can be compiled: elsewhere the benchmark says why there is no such row."""
    why = limit.build(limit.Path(work.data))
    if why:
        assert "jpeglib.h" in why or "compiler" in why or "immintrin" in why or "AVX2" in why or "-ljpeg" in why
        return
    files = [open(f"{work.place('files/train')}/{name}", "rb").read() for name in work.names("files/train", "*.jpg")]
    data = [np.frombuffer(file, np.uint8) for file in files]
    starts = np.array([one.ctypes.data for one in data], np.uint64)
    sizes = np.array([len(one) for one in data], np.uint64)
    draws = np.random.default_rng(0).random((IMAGES, 5))
    out = np.empty((IMAGES, SIDE, SIDE, 3), np.uint8)
    boxes = limit.Crop(limit.Path(work.data))(starts, sizes, draws, out)
    for file, draw, (left, top, width, height), ours in zip(files, draws, boxes.tolist(), out, strict=True):
        image = Image.open(io.BytesIO(file))
        assert (left, top, width, height) == draw_box(*image.size, draw)
        part = image.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        wanted = np.asarray(part)[:, ::-1] if draw[4] < 0.5 else np.asarray(part)
        assert np.abs(wanted.astype(int) - ours).max() <= 1
    row.take(limit.open_feed(work), work, 0, None)


def test_cpu_and_memory_of_children_count():
    before = processes.cpu_s(os.getpid())
    spin = (
        "import time, os\nwhile time.process_time() < 0.3: pass\nx = bytearray(50 << 20)\nprint(1, flush=True)\ninput()"
    )
    child = subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert processes.pss_mb(child.pid) > 50
        assert processes.cpu_s(os.getpid()) - before >= 0.25
    finally:
        child.communicate(b"\n")
    assert processes.cpu_s(os.getpid()) - before >= 0.25  # it has ended and was waited for


def test_the_report_takes_shares_within_pairs():
    def run(number, name, wall_s, cpu_s, limit_wall_s):
        epochs = [{"first_s": 0.2, "wall_s": w, "cpu_s": c, "busy": 0.9} for w, c in ((9, 9), (wall_s, cpu_s))]
        beside = [{"first_s": 0.1, "wall_s": w, "cpu_s": 2.0, "busy": 0} for w in (9, limit_wall_s)]
        return {"round": number, "row": name, "limit": {"epochs": beside, "peak_mb": 1}, "epochs": epochs, "peak_mb": 7}

    runs = [run(0, "scalecv_feed", 2, 2.5, 1), run(0, "spdl_threads", 4, 5, 1), run(1, "scalecv_feed", 4, 2.5, 2)]
    runs += [
        run(1, "spdl_threads", 8, 5, 2),
        run(0, "consumer", 2, 2, 1),
        {"round": 1, "row": "ray_data", "error": "no"},
    ]
    runs[-1]["limit"] = None
    args = argparse.Namespace(store=None, latency_ms=0, images=1000, workers=2, batch=128, rounds=2, consumer=0.8)
    text, figures = report(runs, args)
    assert figures["rows"]["scalecv_feed"]["cpu_share_of_limit"] == 0.8
    assert figures["rows"]["scalecv_feed"]["wall_share_of_limit"] == 0.5
    assert figures["against_best_peer"] == {"cpu_s": [2.0, 2.0], "wall_s": [2.0, 2.0]}
    assert "| scalecv | 375 | 400 | 0.50 | 0.80 (0.80 to 0.80) | 0.20 / 0.20 | 7 |" in text
    assert "Round 1, Ray Data" in text and "busy for 0.900" in text


def test_work_travels_as_json():
    work = Work("data", 3, 2, 1, Store("http://here", "key", "secret", "bucket"))
    assert work_of(work.as_dict()) == work and work.place("tar") == "s3://bucket/tar"
