"""Row groups of a split, in the planned order, read ahead by threads of this process or by Ray Data.

    wanted ──▶ waiting, seen ahead ──▶ requests under way ──▶ tables, in the order of `wanted`

How far to read ahead follows Little's law: what is under way = the rate at which tables are taken x the seconds that a
request takes. Row groups that lie next to each other in a shard and are wanted close together share a request.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow.parquet  # noqa: F401 - with the feed, not while its first batch is waited for

from scalecv import malloc, storage
from scalecv.errors import IntegrityError
from scalecv.shards import row_groups
from scalecv.shards.manifest import Shard
from scalecv.shards.store import Dataset, read_row_group

START_BYTES = 64 << 20
"""Of a bucket, read ahead before anything is measured: the first batch needs many row groups at once. A local disk
answers at once, and what it brings too early takes the CPUs from the first batch: LEAST_BYTES."""
LEAST_BYTES, MOST_BYTES = 16 << 20, 128 << 20
JOINED_BYTES = 9_000_000
"""Two row groups of 4 MiB, each with the end of its last image, fit in."""
RATED_S = 1.0
"""Over which the rate is taken: windows begin with up to 16 row groups at once."""
LOOK_BYTES, MOST_GROUPS = 32 << 20, 1024
"""How far beyond the requests the order is looked at for neighbours; and how far ahead of the consumer at all."""
IN_FLIGHT, IN_FLIGHT_LOCAL = 32, 8
"""Most requests at a time, of a bucket and of a local disk."""

Groups = list[tuple[Shard, int]]
"""Row groups of a split: shard and number in it, in the order of the manifest."""
Reader = Callable[[Dataset, Groups, Iterator[int], threading.Event | None], Iterator[Any]]
"""(dataset, row groups, numbers to read, event that ends it) -> Arrow tables in that order, an IntegrityError where one
cannot be read. After the event threads of this process do not wait for a store that is away: Abandoned."""


@dataclass(eq=False)
class _Wanted:
    """One row group of the order."""

    number: int
    size_bytes: int
    run: Future[list[Any]] | None = None
    """The request that brings it; None as long as it is only seen ahead."""
    place: int = 0
    """In what the request brings."""


class Pace:
    """How many bytes may be under way or ready: twice what Little's law asks for, within bounds."""

    def __init__(self, start_bytes: int = START_BYTES) -> None:
        self.ahead_bytes = start_bytes
        self._request_s = 0.0
        self._bytes_per_s = 0.0
        self._taken: deque[tuple[float, int]] = deque()
        self._taken_bytes = 0
        self._lock = threading.Lock()

    def answered(self, seconds: float) -> None:
        """A request took so long, until its tables were ready."""
        with self._lock:
            self._request_s = 0.8 * self._request_s + 0.2 * seconds if self._request_s else seconds

    def took(self, size_bytes: int, now: float) -> None:
        """A table was taken. Some steps take many at once, which is no rate: that of a second is, slowly forgotten."""
        self._taken.append((now, size_bytes))
        self._taken_bytes += size_bytes
        if now - self._taken[0][0] < RATED_S:
            return
        while now - self._taken[1][0] >= RATED_S:
            self._taken_bytes -= self._taken.popleft()[1]
        self._bytes_per_s = max(
            0.98 * self._bytes_per_s, (self._taken_bytes - self._taken[0][1]) / (now - self._taken[0][0])
        )
        self.ahead_bytes = int(min(max(LEAST_BYTES, 2 * self._bytes_per_s * self._request_s), MOST_BYTES))


def threads_reader(
    dataset: Dataset, groups: Groups, wanted: Iterator[int], stop: threading.Event | None = None
) -> Iterator[Any]:
    """Row groups read by threads of this process; `wanted` is walked only as far as is read ahead."""
    is_local = storage.is_local(dataset.uri)
    threads = min(IN_FLIGHT_LOCAL, 2 * (os.cpu_count() or 1)) if is_local else IN_FLIGHT
    queue: deque[_Wanted] = deque()
    if not is_local:
        malloc.few_heaps()
    with ThreadPoolExecutor(threads, "read", initializer=storage.abandon_when, initargs=(stop,)) as pool:
        ahead = _Ahead(dataset, groups, wanted, queue, pool)
        try:
            while ahead.fill():
                head = queue.popleft()
                began = time.perf_counter()
                tables = cast(Future[list[Any]], head.run).result()
                table, tables[head.place] = tables[head.place], None
                now = time.perf_counter()
                dataset.reads.add(wait_s=now - began)
                ahead.pace.took(head.size_bytes, now)
                yield table
                del table, tables
                ahead.held_bytes -= head.size_bytes
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Ahead:
    """What is read ahead of the consumer: fills the queue, and starts the requests."""

    def __init__(
        self,
        dataset: Dataset,
        groups: Groups,
        wanted: Iterator[int],
        queue: deque[_Wanted],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.pace = Pace(LEAST_BYTES if storage.is_local(dataset.uri) else START_BYTES)
        self.held_bytes = 0
        """Of row groups that are under way, ready, or in the consumer's hands."""
        self._dataset, self._groups, self._wanted, self._queue, self._pool = dataset, groups, wanted, queue, pool
        self._seen: deque[_Wanted] = deque()
        self._seen_bytes = 0
        self._by_number: dict[int, _Wanted] = {}
        self._footers: set[str] = set()
        """Shards whose footer was asked for: it comes at the same time as the first row groups."""

    def fill(self) -> bool:
        """Look ahead and start what may be under way; False at the end of the order."""
        while self._look() and self._may_start():
            self._start(self._seen[0])
            while self._seen and self._seen[0].run:
                self._seen.popleft()
        return bool(self._queue)

    def _look(self) -> bool:
        """See a stretch of the order; whether there is something to start."""
        while self._seen_bytes < LOOK_BYTES and len(self._queue) < MOST_GROUPS:
            number = next(self._wanted, None)
            if number is None:
                break
            shard, index = self._groups[number]
            start, end = shard.byte_ranges[index]
            one = _Wanted(number, end - start)
            self._queue.append(one)
            self._seen.append(one)
            self._by_number.setdefault(number, one)
            self._seen_bytes += one.size_bytes
        return bool(self._seen)

    def _may_start(self) -> bool:
        """Whether there is room; what the consumer needs next is always started."""
        first = self._seen[0]
        return self.held_bytes + first.size_bytes <= self.pace.ahead_bytes or self._queue[0] is first

    def _start(self, first: _Wanted) -> None:
        """Request a row group together with its neighbours that were seen."""
        shard, _ = self._groups[first.number]
        run, size = [first], first.size_bytes
        for step in (1, -1):
            number = first.number + step
            while (
                (more := self._by_number.get(number))
                and self._groups[number][0] is shard
                and size + more.size_bytes <= JOINED_BYTES
            ):
                run.append(more)
                size += more.size_bytes
                number += step
        run.sort(key=lambda one: one.number)
        path = storage.join(self._dataset.uri, shard.path)
        if path not in self._footers:
            self._footers.add(path)
            self._pool.submit(row_groups.footers, path, shard, self._dataset.cache, self._dataset.reads)
        future = self._pool.submit(self._read, shard, [self._groups[one.number][1] for one in run])
        for place, one in enumerate(run):
            one.run, one.place = future, place
            if self._by_number.get(one.number) is one:
                del self._by_number[one.number]
        self.held_bytes += size
        self._seen_bytes -= size

    def _read(self, shard: Shard, indexes: list[int]) -> list[Any]:
        """The tables of row groups of one shard, or the errors that say why there are none."""
        began = time.perf_counter()
        dataset, path = self._dataset, storage.join(self._dataset.uri, shard.path)
        pieces = [row_groups.row_group(shard, index) for index in indexes]
        tables: list[Any] = []
        try:
            fetched = row_groups.fetch(path, pieces, dataset.cache, dataset.reads, _own_memory())
            footer = row_groups.footers(path, shard, dataset.cache, dataset.reads)
        except IntegrityError:
            return [_read_alone(dataset, shard, index) for index in indexes]
        for index, data in zip(indexes, fetched, strict=True):
            try:
                tables.append(row_groups.decode(path, shard, index, data, footer))
            except IntegrityError:
                tables.append(_read_alone(dataset, shard, index))
        self.pace.answered(time.perf_counter() - began)
        return tables


_THREAD = threading.local()


def _own_memory() -> memoryview:
    """Memory of this thread for what it reads, until its tables are decoded, which copies: new pages cost more."""
    kept: memoryview | None = getattr(_THREAD, "memory", None)
    if kept is None:
        kept = _THREAD.memory = np.empty(JOINED_BYTES, np.uint8).data
    return kept


def read_or_error(dataset: Dataset, groups: Groups, group: int) -> Any:
    """One row group as an Arrow table, or the error that says why it cannot be read."""
    return _read_alone(dataset, *groups[group])


def _read_alone(dataset: Dataset, shard: Shard, index: int) -> Any:
    try:
        return read_row_group(dataset.uri, shard, index, cache=dataset.cache, reads=dataset.reads)
    except IntegrityError as error:
        return error


def ray_reader(
    dataset: Dataset, groups: Groups, wanted: Iterator[int], stop: threading.Event | None = None
) -> Iterator[Any]:
    """Row groups read by Ray Data tasks anywhere in the cluster, in the planned order (see batches/ray_reader.py)."""
    from scalecv.batches.ray_reader import stream

    return stream(dataset, groups, wanted)


READERS: dict[str, Reader] = {"threads": threads_reader, "ray": ray_reader}
