"""The node's cache: whole or absent, capped, shared by processes, and never in the way."""

import hashlib
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from scalecv import cache as caches
from scalecv.cache import NodeCache


@pytest.fixture
def cache(tmp_path):
    yield NodeCache(str(tmp_path / "cache"), 1_000_000)
    caches._off.clear()


def bytes_of(number: int, size: int = 50_000) -> bytes:
    return hashlib.sha256(b"%d" % number).digest() * (size // 32)


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(cache: NodeCache, data: bytes) -> str:
    with cache.part(name_of(data)) as part:
        if part:
            part.keep(memoryview(data))
    return name_of(data)


def held(cache: NodeCache) -> dict[str, int]:
    """Names and sizes of all that lies in the folder."""
    sizes = {}
    for entry in os.scandir(cache.folder):
        try:
            sizes[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def script(body: str, *arguments: str) -> subprocess.Popen[bytes]:
    head = "import os, sys, time\nfrom scalecv.cache import NodeCache\nfrom tests.test_cache import *\n"
    return subprocess.Popen([sys.executable, "-c", head + body, *arguments], stdout=subprocess.PIPE)


def test_what_was_kept_is_mapped_and_what_was_not_is_absent(cache):
    data = bytes_of(1)
    assert cache.read(name_of(data), len(data)) is None
    name = put(cache, data)
    found = cache.read(name, len(data))
    assert found == data and found.readonly
    assert cache.read(name, len(data) - 1) is None, "another size is damage"
    assert found == data, "still mapped"
    assert name not in held(cache)


def test_what_was_used_longest_ago_goes_first_and_the_cap_holds(cache):
    names = [put(cache, bytes_of(number)) for number in range(15)]
    assert cache.read(names[0], 50_000 // 32 * 32) is not None
    names += [put(cache, bytes_of(number)) for number in range(15, 30)]
    left = held(cache)
    assert sum(left.values()) <= cache.max_bytes
    assert names[0] in left and names[1] not in left and names[-1] in left
    assert int((cache.folder / "total").read_bytes()) == sum(left[name] for name in names if name in left)
    put(cache, bytes_of(99, 2_000_000))
    assert held(cache).keys() == left.keys(), "what is larger than the cap is not kept, and nothing goes for it"


def test_the_cap_holds_with_several_writers(cache):
    writer = """
cache = NodeCache(sys.argv[1], 1_000_000)
for number in range(80):
    data = bytes_of(int(sys.argv[2]) * 1000 + number % 60, 30_000 + number * 500)
    put(cache, data)
    found = cache.read(name_of(data), len(data))
    assert found is None or found == data
"""
    writers = [script(writer, cache.dir, str(number)) for number in range(3)]
    most = 0
    while any(one.poll() is None for one in writers):
        if (cache.folder / "lock").exists():
            with cache._locked():  # a file that is renamed meanwhile would be seen twice
                most = max(most, sum(held(cache).values()))
        time.sleep(0.002)
    assert [one.returncode for one in writers] == [0, 0, 0]
    assert 500_000 < most <= cache.max_bytes
    assert not [name for name in held(cache) if name.endswith(caches.PART)]


def test_a_killed_writer_leaves_nothing_half(cache):
    put(cache, bytes_of(0))
    name = name_of(bytes_of(1))
    process = script(
        """
with NodeCache(sys.argv[1], 1_000_000).part(sys.argv[2]) as part:
    part._cache._reserve(part._handle, 50_000)
    os.pwrite(part._handle, bytes(20_000), 0)
    print("half", flush=True)
    time.sleep(60)
""",
        cache.dir,
        name,
    )
    assert process.stdout.readline() == b"half\n"
    assert held(cache)[name + caches.PART] == 50_000 and cache.read(name, 50_000) is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    caches._swept.clear()  # as a new process
    put(cache, bytes_of(2))
    left = held(cache)
    assert name + caches.PART not in left and len(left) == 4  # two names, lock and total
    assert int((cache.folder / "total").read_bytes()) == sum(size for key, size in left.items() if len(key) == 64)
    with cache.part(name) as part:
        part.keep(memoryview(bytes_of(1)))
    assert cache.read(name, len(bytes_of(1))) == bytes_of(1)


def test_who_comes_second_waits_for_the_first(cache):
    data = bytes_of(5)
    fetch = """
cache, data = NodeCache(sys.argv[1], 1_000_000), bytes_of(5)
with cache.part(name_of(data)) as part:
    if cache.read(name_of(data), len(data)) is None:
        print("fetches", flush=True)
        time.sleep(0.3)
        part.keep(memoryview(data))
"""
    several = [script(fetch, cache.dir) for _ in range(3)]
    said = [one.communicate(timeout=30)[0] for one in several]
    assert sorted(said) == [b"", b"", b"fetches\n"]
    assert cache.read(name_of(data), len(data)) == data


def test_who_takes_too_long_is_not_waited_for(cache, monkeypatch):
    monkeypatch.setattr(caches, "WAIT_S", 0.1)
    with cache.part("a" * 64) as first, cache.part("a" * 64) as second:
        assert first is not None and second is None


@pytest.mark.parametrize("why", ["no folder", "full"])
def test_a_disk_that_refuses_ends_the_cache_with_one_warning(tmp_path, caplog, why):
    caplog.set_level(logging.WARNING, "scalecv.cache")
    (tmp_path / "file").write_bytes(b"")
    cache = NodeCache(str(tmp_path / ("file" if why == "no folder" else "cache")), 1_000_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if why == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for number in range(3):
            name = put(cache, bytes_of(number))
            assert cache.read(name, len(bytes_of(number))) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        caches._off.clear()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"cache.dir={cache.dir} cannot be used (") and "without a cache" in said
    if why == "full":
        assert not [name for name in held(cache) if len(name) > 60], "nothing half is left"


def test_files_of_others_are_left_alone(cache):
    cache.folder.mkdir(parents=True)
    (cache.folder / "notes.txt").write_bytes(bytes(900_000))
    for number in range(30):
        put(cache, bytes_of(number))
    assert (cache.folder / "notes.txt").stat().st_size == 900_000
