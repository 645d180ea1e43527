"""Reading ahead from a real bucket: order, requests, latency, damage, and the node's cache."""

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scalecv import cache as caches
from scalecv import malloc, storage
from scalecv.batches import reader
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import pixels_of
from scalecv.config import Cache, Data
from scalecv.errors import IntegrityError
from scalecv.shards import row_groups
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from scalecv.testing.store_proxy import Faults
from tests.shards.images import class_folders

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """120 rows in row groups of 5 to 10, and the tables of its training split."""
    root = tmp_path_factory.mktemp("reader")
    source, to = class_folders(root / "source", each=40), str(root / "data")
    ingest(IngestOptions(source=str(source), to=to, layout="imagefolder", row_group_mb=0.004, concurrency=0))
    dataset = open_dataset(to)
    groups = groups_of(dataset)
    return dataset, list(reader.threads_reader(dataset, groups, iter(range(len(groups)))))


@pytest.fixture
def uri(proxy, s3, local):
    """A copy of the dataset in a bucket; requests are counted from zero."""
    dataset, uri = local[0], f"{s3.bucket()}/data"
    for entry in storage.list_entries(dataset.uri):
        storage.put(storage.join(uri, entry.path), storage.get(storage.join(dataset.uri, entry.path)))
    row_groups.footers.cache_clear()
    return uri


def groups_of(dataset):
    return [(shard, index) for shard in dataset.manifest.shards_of("train") for index in range(len(shard.row_groups))]


def read(dataset, order, groups=None):
    return list(reader.threads_reader(dataset, groups or groups_of(dataset), iter(order)))


def opened(uri, proxy, **cache):
    """The dataset, with the requests of opening it not counted."""
    dataset = open_dataset(uri, cache=Cache(**cache) if cache else None)
    proxy.done.clear()
    return dataset


@pytest.mark.parametrize("joined", [1, 3])
def test_tables_come_in_order_and_neighbours_share_requests(uri, proxy, local, monkeypatch, joined):
    dataset, groups = opened(uri, proxy), groups_of(local[0])
    shards = {shard.path for shard, _ in groups}
    largest = max(end - start for shard, index in groups for start, end in [shard.byte_ranges[index]])
    monkeypatch.setattr(reader, "JOINED_BYTES", joined * largest)
    order = list(range(len(groups)))
    random.Random(1).shuffle(order)
    for table, number in zip(read(dataset, order), order, strict=True):
        assert table.equals(local[1][number])
    assert proxy.done["requests"] == dataset.reads.gets
    if joined == 1:
        assert dataset.reads.gets <= len(shards) + len(groups)
    else:
        assert dataset.reads.gets <= len(shards) + 0.6 * len(groups)
    assert read(dataset, order[:2]) and dataset.reads.gets == proxy.done["requests"], "footers are fetched once"
    assert dataset.reads.told().keys() == {"gets", "get_bytes", "get_s", "hits", "wait_s"}


def test_latency_is_hidden_by_requests_in_flight(uri, proxy, local, monkeypatch):
    dataset, groups = opened(uri, proxy), groups_of(local[0])
    monkeypatch.setattr(reader, "JOINED_BYTES", 0)
    proxy.faults = Faults(latency_s=0.1)
    asked = []
    monkeypatch.setattr(malloc, "few_heaps", lambda: asked.append(dataset))
    began = time.perf_counter()
    assert len(read(dataset, range(len(groups)))) == len(groups) > 8
    assert time.perf_counter() - began < 0.5 * 0.1 * len(groups)
    assert dataset.reads.get_s > 0.1 * len(groups)
    assert read(local[0], [0]) and asked == [dataset], "threads that wait share heaps; those of a disk are few"


def test_the_order_is_walked_no_further_than_is_read_ahead(local, monkeypatch):
    dataset, groups = local[0], groups_of(local[0])
    size = max(end - start for shard, index in groups for start, end in [shard.byte_ranges[index]])
    for name in ("START_BYTES", "LEAST_BYTES", "MOST_BYTES"):
        monkeypatch.setattr(reader, name, 3 * size)
    monkeypatch.setattr(reader, "LOOK_BYTES", 2 * size)
    walked = []
    order = (walked.append(number) or number for number in (place % len(groups) for place in range(10_000)))
    tables = reader.threads_reader(dataset, groups, order)
    for _ in range(5):
        next(tables)
    assert 5 < len(walked) < 25
    tables.close()


def test_tables_do_not_lie_in_the_memory_that_is_read_into(local):
    dataset, tables = local
    shard, number = groups_of(dataset)[0]
    path, own = storage.join(dataset.uri, shard.path), memoryview(bytearray(1 << 20))
    (data,) = row_groups.fetch(path, [row_groups.row_group(shard, number)], memory=own)
    assert data is not None and data.obj is own.obj
    table = row_groups.decode(path, shard, number, data, row_groups.footers(path, shard))
    own[:] = bytes(len(own))
    assert table.equals(tables[0])


def test_one_row_group_larger_than_all_bounds_is_read(local, monkeypatch):
    for name in ("START_BYTES", "LEAST_BYTES", "MOST_BYTES", "LOOK_BYTES"):
        monkeypatch.setattr(reader, name, 1)
    dataset, tables = local
    assert all(a.equals(b) for a, b in zip(read(dataset, range(len(tables))), tables, strict=True))
    assert len(read(dataset, [0, 0, 1, 0])) == 4, "a row group may come back"


def test_a_long_row_group_comes_in_several_ranges(uri, proxy, local, monkeypatch):
    monkeypatch.setattr(row_groups, "RANGE_BYTES", 700)
    dataset, tables = opened(uri, proxy), local[1]
    assert all(a.equals(b) for a, b in zip(read(dataset, range(len(tables))), tables, strict=True))
    assert dataset.reads.gets == proxy.done["requests"] > 2 * len(tables)


def test_a_damaged_row_group_costs_its_neighbours_nothing(uri, proxy, local):
    dataset, (shard, index) = opened(uri, proxy), groups_of(local[0])[1]
    path = storage.join(uri, shard.path)
    data = bytearray(storage.get(path))
    data[shard.byte_ranges[index][0] + 100] ^= 4
    storage.put(path, bytes(data))
    found = read(dataset, range(len(local[1])))
    assert isinstance(found[1], IntegrityError) and f"row group {index} is damaged" in str(found[1])
    assert all(a.equals(b) for place, (a, b) in enumerate(zip(found, local[1], strict=True)) if place != 1)
    row_groups.footers.cache_clear()
    storage.delete([path])
    found = read(dataset, range(len(local[1])))
    gone = [place for place, (one, _) in enumerate(groups_of(local[0])) if one.path == shard.path]
    assert all(("is gone" in str(table)) == (place in gone) for place, table in enumerate(found))


def test_bits_that_flip_on_the_way_are_read_once_more(uri, proxy, local, monkeypatch):
    monkeypatch.setattr(reader, "JOINED_BYTES", 0)
    dataset = opened(uri, proxy)
    proxy.faults = Faults(flip=0.1, seed=3)
    found = read(dataset, [*range(len(local[1]))] * 2)
    assert proxy.done["flip"]
    assert all(isinstance(a, IntegrityError) or a.equals(b) for a, b in zip(found, local[1] * 2, strict=True))
    assert sum(isinstance(table, IntegrityError) for table in found) <= 1


def test_the_second_epoch_issues_no_request(uri, proxy, tmp_path):
    dataset = opened(uri, proxy, dir=str(tmp_path / "cache"))
    pixels = pixels_of(dataset.manifest, Data(uri=uri), uri)
    feed = Feed(dataset, "train", pixels, 16, is_training=True)
    rows = [row for _, batch in feed.epoch(0) for row in batch["id"]]
    assert proxy.done["requests"] == dataset.reads.gets > 0 == dataset.reads.hits
    proxy.done.clear()
    row_groups.footers.cache_clear()  # as another process, or another run
    again = Feed(dataset, "train", pixels, 16, is_training=True, seed=1)
    assert sorted(row for _, batch in again.epoch(1) for row in batch["id"])[:5] == sorted(rows)[:5]
    assert proxy.done["requests"] == 0 and dataset.reads.hits > 0


def test_flipped_bits_in_the_cache_are_fetched_again(uri, proxy, local, tmp_path):
    dataset, tables = opened(uri, proxy, dir=str(tmp_path / "cache")), local[1]
    read(dataset, range(len(tables)))
    files = [path for path in dataset.cache.folder.iterdir() if len(path.name) == 64]
    assert len(files) > len(tables), "row groups and footers"
    for path in files:
        data = bytearray(path.read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
    row_groups.footers.cache_clear()
    asked = dataset.reads.gets
    found = read(dataset, range(len(tables)))
    assert all(a.equals(b) for a, b in zip(found, tables, strict=True))
    assert dataset.reads.gets == 2 * asked
    row_groups.footers.cache_clear()
    assert all(a.equals(b) for a, b in zip(read(dataset, range(len(tables))), tables, strict=True))
    assert dataset.reads.gets == 2 * asked, "and kept again"


def test_several_processes_fetch_each_row_group_once(uri, proxy, local, tmp_path):
    body = """
import sys
from scalecv.batches.reader import threads_reader
from scalecv.config import Cache
from scalecv.shards.store import open_dataset
dataset = open_dataset(sys.argv[1], cache=Cache(dir=sys.argv[2]))
groups = [(shard, i) for shard in dataset.manifest.shards_of("train") for i in range(len(shard.row_groups))]
print("ready", flush=True)
sys.stdin.readline()
tables = list(threads_reader(dataset, groups, iter(range(len(groups)))))
print(sum(len(table) for table in tables), dataset.reads.gets, flush=True)
"""
    command = [sys.executable, "-c", body, uri, str(tmp_path / "cache")]
    several = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.stdout.readline() for one in several] == ["ready\n"] * 2
    proxy.faults = Faults(latency_s=0.1)
    for one in several:
        one.stdin.write("go\n")
        one.stdin.flush()
    said = [one.communicate(timeout=60)[0].split() for one in several]
    assert {rows for rows, _ in said} == {str(sum(map(len, local[1])))}
    dataset = opened(uri, proxy, dir=str(tmp_path / "other"))
    row_groups.footers.cache_clear()
    read(dataset, range(len(local[1])))
    assert sum(int(gets) for _, gets in said) == dataset.reads.gets


def test_a_feed_that_stops_does_not_wait_for_a_store_that_is_away(uri, proxy, local):
    dataset = opened(uri, proxy)
    pixels = pixels_of(dataset.manifest, Data(uri=uri, size_px=32), uri)
    feed = Feed(dataset, "train", pixels, batch=8, is_training=True, window_mb=0)
    epoch = feed.epoch(0)
    next(iter(epoch))
    proxy.faults = Faults(away=True)
    again = feed.epoch(1)
    time.sleep(1.0)  # requests have failed and wait to be tried again: up to 5 minutes
    began = time.monotonic()
    again.close()
    epoch.close()
    assert time.monotonic() - began < 30
    proxy.faults = Faults()


def test_one_who_stops_does_not_fail_another_who_waits_for_the_same_footer(uri, proxy, local):
    dataset, stop = opened(uri, proxy), threading.Event()
    shard = groups_of(dataset)[0][0]
    path = storage.join(uri, shard.path)
    proxy.faults = Faults(away=True)

    def ask(event):
        storage.abandon_when(event)
        return row_groups.footers(path, shard)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, stop)
        while path not in row_groups.footers._coming:
            time.sleep(0.01)
        second = pool.submit(ask, None)
        time.sleep(0.5)
        stop.set()
        with pytest.raises(storage.Abandoned, match="for the run stops"):
            first.result(60)
        proxy.faults = Faults()
        assert second.result(60).num_row_groups == len(shard.row_groups)


def test_a_cache_that_cannot_be_written_changes_nothing(uri, proxy, local, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    dataset = opened(uri, proxy, dir=str(tmp_path / "file" / "cache"))
    found = read(dataset, [*range(len(local[1]))] * 2)
    assert all(a.equals(b) for a, b in zip(found, local[1] * 2, strict=True))
    assert len([record for record in caplog.records if record.name == "scalecv.cache"]) == 1
    caches._off.clear()


def test_a_dataset_on_a_local_disk_needs_no_cache(local, tmp_path):
    assert open_dataset(local[0].uri, cache=Cache(dir=str(tmp_path / "cache"))).cache is None
    assert not Path(tmp_path / "cache").exists() and os.path.isdir(local[0].uri)


def test_what_is_read_ahead_follows_rate_and_latency():
    def after(megabytes_per_s, request_s, takes=640):
        pace, now = reader.Pace(), 0.0
        for _ in range(takes):
            pace.answered(request_s)
            now += 4 / megabytes_per_s
            pace.took(4_000_000, now)
        return pace.ahead_bytes

    assert after(400, 0.05) == pytest.approx(2 * 400e6 * 0.05, rel=0.1)
    assert after(100, 0.005) == reader.LEAST_BYTES
    assert after(2000, 0.2) == reader.MOST_BYTES
    assert after(400, 0.05, takes=8) == reader.START_BYTES


def test_row_groups_that_a_step_takes_at_once_are_no_rate():
    pace, now = reader.Pace(), 0.0
    for step in range(100):  # 16 of 4 MB at once, then one in 40 ms: 100 MB/s
        now += 0.04
        for _ in range(16 if step in (0, 6) else 1):
            pace.answered(0.05)
            pace.took(4_000_000, now)
    assert reader.LEAST_BYTES <= pace.ahead_bytes < 1.6 * reader.LEAST_BYTES
