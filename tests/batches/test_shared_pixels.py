"""Decoded images that a node keeps: the same batches, each image decoded once, whatever happens to the file."""

import logging
import os
import resource
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from scalecv import cache as caches
from scalecv.batches import shared_pixels
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import pixels_of
from scalecv.cache import NodeCache
from scalecv.config import Augment, Data, Sampling
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from scalecv.train.run import train
from tests.jpeg.test_turbo import picture
from tests.small import fields_dataset, shapes, shapes_dataset

__all__ = ["NodeCache", "feed", "fields_dataset", "shapes", "shapes_dataset", "walk"]

PLAIN = {"hflip": 0.5, "rot90": True, "brightness": 0.2}
CROPS = {"resized_crop": (0.3, 1.0), "hflip": 0.5}


@pytest.fixture(scope="module")
def photos_dataset(tmp_path_factory):
    """24 JPEGs of two sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        file = folder / "images" / "ab"[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(*((60, 44), (40, 50))[number % 2], seed=number).save(file, quality=85)
    ingest(IngestOptions(source=str(folder / "images"), to=str(folder / "data"), layout="imagefolder", concurrency=0))
    return str(folder / "data")


@pytest.fixture(scope="module")
def holes_dataset(tmp_path_factory):
    """12 float32 tiles with masks, part of each without data."""
    import rasterio

    folder, rng = tmp_path_factory.mktemp("holes"), np.random.default_rng(0)
    for number in range(12):
        image = rng.normal(10, 2, (3, 20, 26)).astype(np.float32)
        image[:, : number + 1, :5] = np.nan
        mask = (image[:1] > 10).astype(np.uint8)
        for kind, data in (("images", image), ("masks", mask)):
            file = folder / "source" / ("val" if number % 4 == 3 else "train") / kind / f"{number}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            about = {"width": 26, "height": 20, "count": len(data), "dtype": data.dtype}
            with rasterio.open(file, "w", driver="GTiff", **about) as out:
                out.write(data)
    ingest(IngestOptions(source=str(folder / "source"), to=str(folder / "data"), layout="masks", concurrency=0))
    return str(folder / "data")


@pytest.fixture
def cache(tmp_path):
    yield NodeCache(str(tmp_path / "cache"), 50_000_000)
    shared_pixels._off.clear()
    caches._swept.clear()


def feed(uri, cache, split="train", size_px=None, augment=PLAIN, **more):
    dataset = open_dataset(uri)
    pixels = pixels_of(dataset.manifest, Data(uri=uri, size_px=size_px, augment=Augment(**augment)), uri)
    return Feed(dataset, split, pixels, 8, is_training=split == "train", threads=2, pixel_cache=cache, **more)


def walk(one, epoch=0):
    """Hash of all batches of an epoch; rows that were taken and decoded, None without a file."""
    total, batches = sha256(), one.epoch(epoch)
    for _, batch in batches:
        for name in ("image", "mask", "label"):
            if name in batch:
                total.update(batch[name].contiguous().numpy().tobytes())
    kept = batches.decoders.pixels
    return total.hexdigest(), kept and (kept.taken, kept.decoded)


def drawn(one):
    """Rows that the batches of an epoch hold."""
    return one.plan(0).steps * 8


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        ("shapes_dataset", {}),
        ("shapes_dataset", {"size_px": 24, "augment": CROPS}),
        ("fields_dataset", {"augment": {**PLAIN, "noise": 0.2}}),
        ("fields_dataset", {"size_px": 20, "augment": CROPS}),
        ("holes_dataset", {"size_px": 16}),
        ("holes_dataset", {"size_px": 16, "augment": {**CROPS, "band_gain": 0.1}}),
        ("photos_dataset", {"size_px": 24}),
        ("photos_dataset", {"size_px": 24, "augment": CROPS, "split": "val"}),
    ],
)
def test_batches_are_the_same_and_each_image_is_decoded_once(request, cache, data, keys):
    uri = request.getfixturevalue(data)
    alone, one = feed(uri, None, **keys), feed(uri, cache, **keys)
    first, (_, decoded) = walk(one, 0)
    assert first == walk(alone, 0)[0] and decoded == one.rows
    for epoch in (1, 2):
        again, counts = walk(one, epoch)
        assert again == walk(alone, epoch)[0] and counts == (drawn(one), 0)


@pytest.mark.parametrize("native", ["0", "1"])
def test_wheels_and_c_share_what_they_make(photos_dataset, cache, native):
    body = "print(walk(feed(sys.argv[1], NodeCache(sys.argv[2], 50_000_000), size_px=24))[0])"
    made = {
        script(body, photos_dataset, cache.dir, SCALECV_NATIVE=which).communicate(timeout=500)[0]
        for which in (native, "10"[int(native)])
    }
    assert len(made) == 1 and made.pop().strip().decode() == walk(feed(photos_dataset, None, size_px=24))[0]


def script(body, *arguments, **env):
    head = "import os, sys, time\nfrom tests.batches.test_shared_pixels import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + body, *arguments], stdout=subprocess.PIPE, env={**os.environ, **env}
    )


def test_what_cannot_be_shared_is_decoded_as_before(photos_dataset, shapes_dataset, cache):
    keys = {"size_px": 24, "augment": CROPS}
    assert walk(feed(photos_dataset, cache, **keys)) == walk(feed(photos_dataset, None, **keys))
    assert walk(feed(photos_dataset, NodeCache(cache.dir, 1000), size_px=24))[1] is None


def test_several_processes_decode_each_image_once(shapes_dataset, cache):
    body = """
one = feed(sys.argv[1], NodeCache(sys.argv[2], 50_000_000))
open(sys.argv[3] + str(os.getpid()), "w").close()
while len([name for name in os.listdir(os.path.dirname(sys.argv[3])) if name.startswith("here")]) < 3:
    time.sleep(0.01)
for epoch in range(2):
    made, (_, decoded) = walk(one, epoch)
    print(made, decoded, flush=True)
"""
    several = [script(body, shapes_dataset, cache.dir, str(Path(cache.dir).parent / "here")) for _ in range(3)]
    said = [one.communicate(timeout=500)[0].decode().split() for one in several]
    alone = feed(shapes_dataset, None)
    for words in said:
        assert words[::2] == [walk(alone, 0)[0], walk(alone, 1)[0]]
    assert sum(int(word) for words in said for word in words[1::2]) == alone.rows


def test_a_process_that_is_stopped_or_killed_holds_nobody_up(shapes_dataset, cache, monkeypatch):
    monkeypatch.setattr(shared_pixels, "PATIENCE_S", 0.2)
    one = feed(shapes_dataset, cache)
    body = """
kept = feed(sys.argv[1], NodeCache(sys.argv[2], 50_000_000)).open_pixels()
print([kept._claim(number) for number in range(4)], flush=True)
time.sleep(100)
"""
    other = script(body, shapes_dataset, cache.dir)
    assert other.stdout.readline() == b"[True, True, True, True]\n"
    expected = [walk(feed(shapes_dataset, None), epoch)[0] for epoch in range(3)]
    assert walk(one, 0) == (expected[0], (drawn(one) - one.rows, one.rows))
    assert walk(one, 1)[1][1] == 4, "what the other has begun is not there yet"
    os.kill(other.pid, signal.SIGKILL)
    other.wait(10)
    assert walk(one, 1) == (expected[1], (drawn(one) - 4, 4))
    assert walk(one, 2) == (expected[2], (drawn(one), 0))


def test_runs_that_use_other_rows_find_theirs(shapes_dataset, cache):
    walk(feed(shapes_dataset, cache))
    for more in ({"limit": 30}, {"sampling": Sampling(balance=1.0)}, {"window_mb": 0}, {"rank": 1, "ranks": 2}):
        made, (_, decoded) = walk(feed(shapes_dataset, cache, **more))
        assert (made, decoded) == (walk(feed(shapes_dataset, None, **more))[0], 0)


def file_of(cache):
    (found,) = cache.folder.glob(f"*{caches.SLOTS}")
    return found


@pytest.mark.parametrize("how", ["bit", "zeros", "short", "odd", "empty", "gone"])
def test_a_damaged_file_is_filled_again(fields_dataset, cache, how):
    one = feed(fields_dataset, cache)
    expected = walk(one)[0]
    path, slot = file_of(cache), one.open_pixels().layout.slot_bytes
    size = path.stat().st_size
    with path.open("r+b") as file:
        if how == "bit":
            file.seek(slot + 100)
            byte = file.read(1)
            file.seek(slot + 100)
            file.write(bytes([byte[0] ^ 4]))
        elif how == "zeros":  # a head without its pixels
            file.seek(2 * slot + 8)
            file.write(bytes(slot - 8))
        elif how == "gone":
            path.unlink()
        else:
            file.truncate({"short": size - 3 * slot, "odd": size - 500, "empty": 0}[how])
    lost = {"bit": 1, "zeros": 1, "short": 3, "odd": 1}.get(how, one.rows)
    made, (_, decoded) = walk(one)
    assert (made, decoded) == (expected, lost)
    assert walk(one)[1][1] == 0
    assert sum(entry.stat().st_size for entry in cache.folder.iterdir()) <= cache.max_bytes


def test_a_file_that_is_cut_short_in_use_ends_nothing(fields_dataset, cache):
    one = feed(fields_dataset, cache)
    expected = walk(one)[0]
    epoch = one.epoch(0)
    kept = epoch.decoders.pixels
    os.truncate(file_of(cache), kept.layout.slot_bytes // 2)
    epoch.close()
    assert walk(one)[0] == expected


def test_a_full_disk_is_said_once_and_batches_stay_the_same(fields_dataset, cache, caplog):
    caplog.set_level(logging.WARNING, "scalecv.cache")
    one, alone = feed(fields_dataset, cache), feed(fields_dataset, None)
    slot = one.open_pixels().layout.slot_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * slot + 100, hard))
    try:
        for epoch in range(3):
            made, counts = walk(one, epoch)
            assert made == walk(alone, epoch)[0]
            assert counts[1] >= one.rows - 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{cache.folder} cannot keep decoded images (") and "decodes for itself" in said


def test_a_folder_that_others_can_write_to_is_not_used(shapes_dataset, cache, caplog):
    caplog.set_level(logging.WARNING, "scalecv.cache")
    cache.folder.mkdir(parents=True)
    cache.folder.chmod(0o777)
    assert walk(feed(shapes_dataset, cache))[1] is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert "can be written by others" in said


def test_the_cap_holds_and_rows_beyond_it_are_decoded(shapes_dataset, tmp_path):
    slot = 8 + 16 * 16 * 3 + 32
    small = NodeCache(str(tmp_path / "cache"), 60 * slot)
    one = feed(shapes_dataset, small)
    share = one.rows / sum(one.dataset.manifest.splits.values())
    for epoch in range(2):
        made, counts = walk(one, epoch)
        assert made == walk(feed(shapes_dataset, None), epoch)[0]
    assert 0 < one.open_pixels().slots <= 30 * share and counts[0] and not counts[1]
    assert sum(entry.stat().st_size for entry in small.folder.iterdir()) <= small.max_bytes


def test_another_use_pushes_it_out_and_it_comes_back(shapes_dataset, tmp_path):
    cache = NodeCache(str(tmp_path / "cache"), 200_000)
    one = feed(shapes_dataset, cache)
    assert walk(one)[1][1] == one.rows
    assert walk(one)[1][1] == 0
    for number in range(8):
        data = sha256(b"%d" % number).digest() * 700
        with cache.part(sha256(data).hexdigest()) as part:
            part.keep(memoryview(data))
    assert not [*cache.folder.glob(f"*{caches.SLOTS}")]
    assert walk(one) == (walk(feed(shapes_dataset, None))[0], (drawn(one) - one.rows, one.rows))
    assert sum(entry.stat().st_size for entry in cache.folder.iterdir()) <= cache.max_bytes


def test_only_what_decides_about_pixels_makes_another_file(shapes_dataset, cache):
    def files(**keys):
        walk(feed(shapes_dataset, cache, **keys))
        return len([*cache.folder.glob(f"*{caches.SLOTS}")])

    assert [files(size_px=24), files(size_px=24, augment={}), files(size_px=24, seed=3)] == [1, 1, 1]
    assert [files(size_px=20), files(size_px=20, split="val"), files()] == [2, 3, 4]
    assert files(size_px=24, augment=CROPS) == files(size_px=20, augment={"resized_crop": (0.1, 0.2)}) == 4
    modes = {path.stat().st_mode & 0o777 for path in cache.folder.glob(f"*{caches.SLOTS}")}
    assert modes == {0o600} and cache.folder.stat().st_mode & 0o777 == 0o700


def test_weights_are_those_of_a_run_that_decodes_for_itself(shapes, tmp_path):
    keys = {"cache__dir": str(tmp_path / "cache"), "data__size_px": 24}
    alone = train(shapes(name="alone", **keys))
    assert not (tmp_path / "cache").exists()
    said = []
    for name in ("first", "second"):
        result = train(shapes(name=name, cache__pixels="yes", **keys), tell=said.append)
        assert result.weights_hash == alone.weights_hash
    told = [event["message"] for event in said if "decoded images" in event.get("message", "")]
    assert len(told) == 2 and told[0].startswith("decoded images of 75 of 75 rows are kept"), told
    assert len([*(tmp_path / "cache").glob(f"*/*{caches.SLOTS}")]) == 3
