"""The storage door in front of a bad store: a real one, behind a proxy that breaks what passes."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from scalecv import storage, storage_remote
from scalecv.errors import ConfigError, IntegrityError, StorageError
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset, read_rows
from scalecv.testing.store_proxy import Faults
from tests.shards.images import class_folders

pytestmark = pytest.mark.e2e


@pytest.fixture
def objects(proxy, s3):
    """URIs of 50 objects of 20,000 bytes, and their SHA-256."""
    bucket = s3.bucket()
    held = {f"{bucket}/d/{i:02d}": os.urandom(20_000) for i in range(50)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.put(uri, held[uri]), held))
    proxy.done.clear()
    return {uri: hashlib.sha256(data).hexdigest() for uri, data in held.items()}


def test_no_read_fails_with_30_percent_busy_and_20_percent_cut(proxy, objects):
    def read(number):
        uri, sha256 = list(objects.items())[number % 50]
        if number % 2:
            return len(storage.get(uri, 20_000, sha256))
        return len(storage.get_range(uri, 100, 20_000)) + 100

    proxy.faults = Faults(busy=0.3, cut=0.2)
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(read, range(500))) == [20_000] * 500
    assert proxy.done["busy"] > 150 and proxy.done["cut"] > 60
    assert proxy.done["requests"] <= 2.5 * 500


def test_resets_stalls_and_slow_bodies_are_waited_for(proxy, objects, monkeypatch):
    monkeypatch.setattr(storage_remote, "READ_TIMEOUT_S", 0.5)
    uri, sha256 = next(iter(objects.items()))
    proxy.faults = Faults(reset=0.3, stall=0.3, stall_s=2)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: len(storage.get(uri, 20_000, sha256)), range(40))) == {20_000}
    assert proxy.done["reset"] and proxy.done["stall"]
    proxy.faults = Faults(bytes_per_s=15_000)
    assert len(storage.get(uri, 20_000, sha256)) == 20_000, "longer than the timeout, but never silent"


def test_a_flipped_bit_on_the_way_is_read_once_more(proxy, objects):
    uri, sha256 = next(iter(objects.items()))
    proxy.faults = Faults(flip=0.3)
    noticed = 0
    for _ in range(40):
        try:
            assert hashlib.sha256(storage.get(uri, 20_000, sha256)).hexdigest() == sha256
        except IntegrityError:
            noticed += 1  # twice in a row
    assert proxy.done["flip"] > noticed


def test_a_write_whose_answer_was_lost_counts_once(proxy, s3):
    bucket = s3.bucket()
    proxy.faults = Faults(put_unsent=0.3, put_unanswered=0.3)
    for number in range(8):
        uri, data = f"{bucket}/{number}", os.urandom(16)
        assert storage.put_if_absent(uri, data)
        assert not storage.put_if_absent(uri, b"another")
        assert storage.put_if_match(uri, data + b"!", storage.head(uri).etag)
        assert storage.get(uri) == data + b"!"
    assert proxy.done["put_unsent"] and proxy.done["put_unanswered"]


@pytest.mark.parametrize("absence_s", [3, pytest.param(60, marks=pytest.mark.chaos)])
def test_a_store_that_comes_back_is_waited_for_and_told_of_once(proxy, objects, monkeypatch, caplog, absence_s):
    monkeypatch.setattr(storage_remote, "SAY_AFTER_S", 0.5)
    caplog.set_level(logging.WARNING, "scalecv.storage")
    proxy.faults = Faults(away=True)
    back = threading.Timer(absence_s, lambda: setattr(proxy, "faults", Faults()))
    back.start()
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert set(map(len, pool.map(storage.get, list(objects)[:16]))) == {20_000}
    assert time.monotonic() - began >= absence_s - 0.5
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "has not answered for" in said[0] and said[1].endswith("answers again"), said


def test_a_store_that_never_comes_back_is_one_error_within_the_budget(proxy, objects, monkeypatch):
    monkeypatch.setenv("SCALECV_STORAGE_GIVE_UP_S", "2")
    proxy.faults = Faults(away=True)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"no good answer for 2 s.*SCALECV_STORAGE_GIVE_UP_S"):
        storage.get(next(iter(objects)))
    assert time.monotonic() - began < 15
    monkeypatch.setenv("SCALECV_STORAGE_GIVE_UP_S", "soon")
    with pytest.raises(ConfigError, match="not a number"):
        storage.get(next(iter(objects)))


@pytest.mark.parametrize("faults", [Faults(busy=0.2, cut=0.2), Faults(put_unsent=0.3, put_unanswered=0.3)])
def test_an_ingest_and_its_commit_survive(proxy, s3, tmp_path, faults):
    source, target = class_folders(tmp_path / "source"), f"{s3.bucket()}/ds"
    proxy.faults = faults
    for append in (False, True):
        ingest(IngestOptions(source=str(source), to=target, layout="imagefolder", concurrency=0, append=append))
        class_folders(tmp_path / "source", first=100)
    dataset = open_dataset(target)
    assert dataset.version == 1 and dataset.manifest.rows == 72
    assert sum(table.num_rows for table in read_rows(dataset.uri, dataset.manifest.shards)) == 72


def test_names_of_a_flat_bucket_are_streamed(proxy, s3):
    bucket = s3.bucket()
    names = [f"{i:04d}.png" for i in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.put(f"{bucket}/{name}", b""), [*names, "0500/a/b", "0500/c", "~/x"]))
    proxy.done.clear()
    assert storage.list_names(bucket, limit=5) == names[:5]
    assert proxy.done["requests"] == 1
    assert storage.list_names(bucket) == sorted([*names, "0500", "~"])
    assert storage.list_names(f"{bucket}/0500") == ["a", "c"]
    for number in range(storage_remote.FOLDERS_ONE_BY_ONE + 5):
        storage.put(f"{bucket}/many/{number:02d}/x", b"")
    proxy.done.clear()
    assert len(storage.list_names(f"{bucket}/many")) == storage_remote.FOLDERS_ONE_BY_ONE + 5
    assert proxy.done["requests"] <= storage_remote.FOLDERS_ONE_BY_ONE + 2


def test_the_proxy_as_a_process_takes_orders(s3, monkeypatch):
    command = [sys.executable, "-m", "scalecv.testing.store_proxy", "--upstream", s3.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        monkeypatch.setenv("AWS_ENDPOINT_URL", json.loads(process.stdout.readline())["endpoint"])
        uri = f"{s3.bucket()}/x"
        storage.put(uri, b"1")
        process.stdin.write('{"busy": 1.0}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["requests"] == 1
        monkeypatch.setenv("SCALECV_STORAGE_GIVE_UP_S", "0.5")
        with pytest.raises(StorageError):
            storage.get(uri)
        process.stdin.close()
        assert process.wait(10) == 0
