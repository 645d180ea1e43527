"""A rank's batches of one epoch: row groups stream in, in the planned order, and pixels are made late.

    Plan.reads ──▶ reader (threads here, or Ray Data) ──▶ held row groups ──▶ Picks ──▶ Decoders ──▶ Batch

Encoded bytes travel; each row group is fetched once and dropped when the plan needs it no more.
Both readers give the same row groups in the same order, so they give the same batches.

A row group whose bytes are damaged or gone does not move the others: rows of the next whole row group fill its
places and count nowhere (valid=False), for every number of ranks and after every resume. Training goes on so within
`max_bad`; an evaluation never does, for a metric over other rows is another metric.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from scalecv.batches.collate import Row
from scalecv.batches.decoders import Decoders, Shared
from scalecv.batches.pixels import Pixels
from scalecv.batches.plan import Picks, Plan, order_key
from scalecv.batches.reader import READERS, Groups, read_or_error
from scalecv.batches.sampling import kinds_of, limited, strata_of
from scalecv.batches.strata import Strata
from scalecv.config import Sampling
from scalecv.errors import IntegrityError
from scalecv.schema import Batch
from scalecv.shards.manifest import Shard
from scalecv.shards.store import Dataset

BATCHES_AHEAD = 3

Schedule = Iterator[tuple[int, list[int], list[int]]]
"""(step, row groups to fetch before it, row groups to drop after it)."""


@dataclass(frozen=True)
class Damaged:
    """A row group that was left out of an epoch."""

    shard: str
    """Path below the dataset."""
    row_group: int
    rows: int
    reason: str
    """The whole message: what was found, where, what to do."""


@dataclass(frozen=True)
class Feed:
    """What one rank needs to read its share of any epoch of one split."""

    dataset: Dataset
    split: str
    pixels: Pixels
    batch: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    is_training: bool = False
    """Training shuffles and augments; otherwise each lane runs through its rows in the order of the manifest."""
    window_mb: int = 128
    threads: int = 1
    reader: str = "threads"
    decode: str = "trainer"
    """trainer, cluster or auto: see batches/decoders.py."""
    max_bad: float = 0.0
    """Share of the split's rows that training may leave out because they cannot be read."""
    sampling: Sampling = field(default_factory=Sampling)
    """Which rows training draws more often."""
    limit: int | None = None
    """Rows that training uses; None uses all."""
    _kept: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    """Row groups of a split that fits into the window: read in the first epoch, held for all others."""
    _shared: Shared = field(default_factory=Shared, compare=False, repr=False)

    @cached_property
    def groups(self) -> Groups:
        """The row groups of the split; with a limit those that hold a row to use."""
        return [group for group, rows in zip(self._all_groups, self._chosen, strict=True) if rows is None or len(rows)]

    @cached_property
    def group_rows(self) -> tuple[int, ...]:
        """Rows to use of each of `groups`."""
        return tuple(s.row_groups[g] if rows is None else len(rows) for (s, g), rows in self._used)

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.group_rows)

    @cached_property
    def _all_groups(self) -> Groups:
        return [(s, g) for s in self.dataset.manifest.shards_of(self.split) for g in range(len(s.row_groups))]

    @cached_property
    def _kinds(self) -> np.ndarray | None:
        """Kind of each row of the split, where training asks for it."""
        if not self.is_training or not (self.sampling.is_on or self.limit):
            return None
        return kinds_of(self.dataset, self.split, self.sampling.min_share)

    @cached_property
    def _limited(self) -> np.ndarray | None:
        """Numbers of the rows to use; None for all."""
        if self._kinds is None or not self.limit or self.limit >= len(self._kinds):
            return None
        key = f"{self.dataset.manifest.fingerprint}|{self.split}|{self.seed}"
        return limited(self._kinds, [s.row_groups[g] for s, g in self._all_groups], self.limit, key)

    @cached_property
    def _chosen(self) -> list[np.ndarray | None]:
        """For each row group of the split the rows to use, int64, ascending; None for all."""
        if self._limited is None:
            return [None] * len(self._all_groups)
        ends = np.cumsum([s.row_groups[g] for s, g in self._all_groups])
        cuts = np.searchsorted(self._limited, ends)
        starts = [0, *cuts[:-1].tolist()], [0, *ends[:-1].tolist()]
        return [self._limited[a:b] - first for a, b, first in zip(starts[0], cuts.tolist(), starts[1], strict=True)]

    @cached_property
    def _used(self) -> list[tuple[tuple[Shard, int], np.ndarray | None]]:
        """`groups`, each with its rows to use."""
        return list(zip(self.groups, [r for r in self._chosen if r is None or len(r)], strict=True))

    @cached_property
    def _strata(self) -> Strata | None:
        if self._kinds is None:
            return None
        kinds = self._kinds if self._limited is None else self._kinds[self._limited]
        return strata_of(kinds, self.sampling, self.dataset.uri)

    def plan(self, epoch: int) -> Plan:
        """The order of one epoch."""
        manifest = self.dataset.manifest
        row_bytes = max(1, manifest.encoded_bytes // max(1, manifest.rows))
        return Plan(
            group_rows=self.group_rows,
            batch=self.batch,
            key=order_key(manifest.fingerprint, self.split, self.seed, epoch if self.is_training else 0),
            shuffle=self.is_training,
            window_rows=max(self.batch, (self.window_mb << 20) // row_bytes),
            strata=self._strata,
        )

    def rows_of(self, picks: Picks) -> list[int]:
        """Rows of their row groups that a step takes."""
        if self._limited is None:
            return list(picks.row.tolist())
        places = zip(picks.group.tolist(), picks.row.tolist(), strict=True)
        return [int(cast(np.ndarray, self._used[group][1])[row]) for group, row in places]

    @cached_property
    def keeps(self) -> bool:
        """Whether the encoded split fits into the window, so that later epochs read nothing."""
        return sum(end - first for s, g in self.groups for first, end in [s.byte_ranges[g]]) <= self.window_mb << 20

    def epoch(self, epoch: int, start: int = 0) -> "Epoch":
        """The batches of one epoch from a step on; reading starts at once, in the background."""
        return Epoch(self, epoch, start)

    def tables(self, epoch: int) -> Iterator[Any]:
        """The row groups of an epoch as they are read, in the planned order; nothing is decoded.

        Raises: IntegrityError: one is damaged.
        """
        wanted = (group for _, fetch, _ in self.plan(epoch).reads(0, self.rank, self.ranks) for group in fetch)
        return map(_whole, READERS[self.reader](self.dataset, self.groups, wanted))

    def some_rows(self, most: int) -> list[Row]:
        """Encoded rows from the beginning of the split.

        Raises: IntegrityError: they are damaged.
        """
        groups, rows = self.groups, list[Row]()
        for number in range(len(groups)):
            columns = _Columns(groups[number], self.dataset, _whole(read_or_error(self.dataset, groups, number)))
            rows += [columns.row(at) for at in range(min(len(columns.ids), most - len(rows)))]
            if len(rows) >= most:
                break
        return rows

    @contextmanager
    def epochs(self, first: int, start: int, end: int) -> Iterator[Iterator["Epoch"]]:
        """Epochs `first` to `end` - 1, the first one from a step on, one after the other.

        The first batches of each are made while the last ones of the epoch before are taken, so that there is no gap.
        """
        begun: dict[int, Epoch] = {}
        lock = threading.Lock()

        def begin(epoch: int) -> None:
            with lock:
                if epoch not in begun and epoch < end and not is_closed:
                    begun[epoch] = Epoch(self, epoch, start if epoch == first else 0, lambda: begin(epoch + 1))

        def each() -> Iterator[Epoch]:
            for epoch in range(first, end):
                begin(epoch)
                yield begun[epoch]
                begun.pop(epoch).close()

        is_closed = False
        try:
            yield each()
        finally:
            with lock:
                is_closed = True
            for left in list(begun.values()):
                left.close()


class Epoch:
    """An iterator over (step, Batch) of one epoch; closing it stops all that runs behind it."""

    def __init__(self, feed: Feed, epoch: int, start: int, then: Callable[[], None] = lambda: None) -> None:
        self.plan = feed.plan(epoch)
        """Its `valid_rows` count the rows of damaged row groups too: no rank knows what the others cannot read."""
        self.wait_s = 0.0
        """Seconds that the consumer waited for batches."""
        self.decode_s = 0.0
        """Seconds that decode threads took for the batches given out, added up over threads."""
        self.damaged: list[Damaged] = []
        """The row groups that this rank left out of the epoch so far, in the order in which it met them."""
        self._feed, self._epoch, self._start, self._then = feed, epoch, start, then
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._stop = threading.Event()
        self.decoders = Decoders(feed.pixels, feed.threads, feed.decode, feed.ranks, feed._shared)
        self._thread = threading.Thread(target=self._produce, name=f"feed-{feed.split}-{epoch}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        try:
            for _ in range(self._start, self.plan.steps):
                began = time.perf_counter()
                item = self._ready.get()
                with self._room:
                    self._room.notify()
                if isinstance(item, BaseException):
                    raise item
                step, picks, pending = item
                batch, took = pending.wait()
                self.decode_s += took
                batch["valid"] = torch.from_numpy(picks.valid)
                batch["position"] = torch.from_numpy(np.where(picks.valid, picks.position, -1))
                waited = time.perf_counter() - began
                self.wait_s += waited
                self.decoders.waited(waited)
                yield step, batch
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading ahead and wait for the threads."""
        self._stop.set()
        with self._room:
            self._room.notify()
        self._thread.join()
        self.decoders.close()

    def _produce(self) -> None:
        feed, groups = self._feed, self._feed.groups
        held: dict[int, Any] = feed._kept if feed.keeps else {}
        for group in [group for group, columns in held.items() if columns.is_stand_in]:
            del held[group]  # it may have been restored since
        schedule, ahead = _tee(
            _without(self.plan.reads(self._start, feed.rank, feed.ranks), held if feed.keeps else None)
        )
        tables = READERS[feed.reader](feed.dataset, groups, ahead)
        try:
            for step, fetch, drop in schedule:
                for group in fetch:
                    if self._stop.is_set():
                        return
                    held[group] = self._columns(groups, group, next(tables))
                picks = self.plan.picks(step, feed.rank, feed.ranks)
                if self.damaged:
                    whole = np.array([not held[g].is_stand_in for g in picks.group.tolist()])
                    picks = replace(picks, valid=picks.valid & whole)
                if not self._has_room():
                    return
                places = zip(picks.group.tolist(), feed.rows_of(picks), picks.draw.tolist(), strict=True)
                rows = [held[group].row(row, draw) for group, row, draw in places]
                seeds = (feed.seed, self._epoch) if feed.is_training else None
                self._ready.put((step, picks, self.decoders.start(rows, seeds)))
                for group in drop:
                    del held[group]
            self._then()
        except BaseException as error:
            self._ready.put(error)
        finally:
            close = getattr(tables, "close", None)
            if close:
                close()

    def _columns(self, groups: Groups, group: int, table: Any) -> "_Columns":
        """A row group's columns; those of the next one that is whole in the place of a damaged one."""
        if not isinstance(table, IntegrityError):
            return _Columns(groups[group], self._feed.dataset, table)
        shard, index = groups[group]
        if all((shard.path, index) != (known.shard, known.row_group) for known in self.damaged):
            self.damaged.append(Damaged(shard.path, index, self._feed.group_rows[group], str(table)))
            self.check_budget(self.damaged)
        for further in range(1, len(groups)):
            number = (group + further) % len(groups)
            other = read_or_error(self._feed.dataset, groups, number)
            if not isinstance(other, IntegrityError):
                return _Columns(groups[number], self._feed.dataset, other, is_stand_in=True)
        raise table

    def check_budget(self, damaged: Collection[Damaged]) -> None:
        """See whether the epoch may go on without these row groups, each of them once, of one rank or of all.

        Raises: IntegrityError: they hold more rows than `max_bad` allows; an evaluation needs all rows.
        """
        feed = self._feed
        lost, rows = sum(one.rows for one in damaged), feed.rows
        if damaged and (not feed.is_training or lost > feed.max_bad * rows):
            what = f"{[*damaged][-1].reason}. {lost} of {rows} rows of {feed.split} cannot be"
            raise IntegrityError(
                f"{what} read, data.max_bad={feed.max_bad:g} allows {int(feed.max_bad * rows)}: `scalecv data verify "
                f"{feed.dataset.uri}` names all damaged row groups; restore the shards or ingest again, and the same "
                "command goes on"
                if feed.is_training
                else f"{what} scored, and a metric over fewer rows would be another metric"
            )

    def _has_room(self) -> bool:
        """Wait until another batch may be begun; False where none is wanted any more."""
        with self._room:
            self._room.wait_for(
                lambda: self._stop.is_set() or self._ready.qsize() < BATCHES_AHEAD + self.decoders.helpers
            )
        return not self._stop.is_set()


class _Columns:
    """One row group's columns, ready to be picked from without copying."""

    def __init__(self, group: tuple[Shard, int], dataset: Dataset, table: Any, *, is_stand_in: bool = False) -> None:
        self.is_stand_in = is_stand_in
        """Whether these rows only fill the places of a row group that cannot be read."""
        self.where = f"{dataset.uri}/{group[0].path}, row group {group[1]}"
        flat = {name: table.column(name).combine_chunks() for name in table.column_names}
        self.ids = flat["id"]
        self.images, self.paths = flat["image"].field("bytes"), flat["image"].field("path")
        self.masks = flat["mask"].field("bytes") if "mask" in flat and flat["mask"].null_count < len(table) else None
        self.labels = flat.get("label")
        self.nodata = flat.get("nodata")

    def row(self, at: int, draw: int = 0) -> Row:
        at %= len(self.ids)  # a stand-in may be shorter
        return Row(
            draw=draw,
            id=self.ids[at].as_py(),
            path=self.paths[at].as_py(),
            where=self.where,
            image=self.images[at].as_py(),
            mask=None if self.masks is None else self.masks[at].as_py(),
            nodata=None if self.nodata is None else self.nodata[at].as_py(),
            label=None if self.labels is None else self.labels[at].as_py(),
        )


def _whole(table: Any) -> Any:
    """A row group that was read; an error that was found instead is raised."""
    if isinstance(table, IntegrityError):
        raise table
    return table


def _without(reads: Schedule, kept: dict[int, Any] | None) -> Schedule:
    """The schedule without what is kept: nothing kept is fetched, and nothing is dropped where all is kept."""
    if kept is None:
        yield from reads
        return
    known = set(kept)
    for step, fetch, _ in reads:
        new = [group for group in fetch if group not in known]
        known.update(new)
        yield step, new, []


def _tee(reads: Schedule) -> tuple[Schedule, Iterator[int]]:
    """The schedule, and the numbers of the row groups it fetches, each at its own pace."""
    import itertools

    schedule, copy = itertools.tee(reads)
    return schedule, (group for _, fetch, _ in copy for group in fetch)


def threads_per_rank(configured: int | None, ranks_on_node: int) -> int:
    """Threads of one process, for decoding or for the network: as configured, or its share of the cores."""
    return configured or max(1, (os.cpu_count() or 1) // max(1, ranks_on_node))
