"""A rank's batches of one epoch: row groups stream in, in the planned order, and pixels are made late.

    Plan.reads ──▶ reader (threads here, or Ray Data) ──▶ held row groups ──▶ Picks ──▶ Decoders ──▶ Batch

Encoded bytes travel; each row group is fetched once and dropped when the plan needs it no more.
Both readers give the same row groups in the same order, so they give the same batches.

A row group whose bytes are damaged or gone does not move the others: rows of the next whole row group fill its
places and count nowhere (valid=False), for every number of ranks and after every resume. Training goes on so within
`max_bad`; an evaluation never does, for a metric over other rows is another metric.
"""

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scalecv import storage
from scalecv.batches.collate import Row
from scalecv.batches.decoders import Decoders
from scalecv.batches.reader import READERS, Groups, read_or_error
from scalecv.errors import IntegrityError
from scalecv.schema import Batch
from scalecv.shards.manifest import Shard
from scalecv.shards.store import Dataset

if TYPE_CHECKING:
    from scalecv.batches.feed import Feed

BATCHES_AHEAD = 3
EARLY_STEPS = 6
"""Before the end of an epoch, from which on the next one is read, so that its first batches are there in time."""
SWITCH_S = 0.0005
"""Most seconds that a thread waits for the interpreter while another one runs Python. With the usual 5 ms training
waited 3 ms for each batch that lay ready."""

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


class Epoch:
    """An iterator over (step, Batch) of one epoch; closing it stops all that runs behind it."""

    def __init__(self, feed: "Feed", epoch: int, start: int, then: Callable[[], None] = lambda: None) -> None:
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
        self.decoders = Decoders(
            feed.pixels, feed.threads, feed.decode, feed.ranks, feed._shared, feed.open_pixels(), feed.gpu
        )
        self.decoders.notes += feed.notes()
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
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
        storage.abandon_when(self._stop)  # also where this thread reads by itself, in the place of a damaged row group
        tables = READERS[feed.reader](feed.dataset, groups, ahead, self._stop)
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
                if step == self.plan.steps - EARLY_STEPS and not feed.keeps:  # else both would change what is kept
                    self._then()
            self._then()
        except BaseException as error:
            self._ready.put(error)
        finally:
            close = getattr(tables, "close", None)
            if close:
                close()

    def _columns(self, groups: Groups, group: int, table: Any) -> "Columns":
        """A row group's columns; those of the next one that is whole in the place of a damaged one."""
        if not isinstance(table, IntegrityError):
            return Columns(groups[group], self._feed.dataset, table, self._feed.first_rows[group])
        shard, index = groups[group]
        if all((shard.path, index) != (known.shard, known.row_group) for known in self.damaged):
            self.damaged.append(Damaged(shard.path, index, self._feed.group_rows[group], str(table)))
            self.check_budget(self.damaged)
        for further in range(1, len(groups)):
            number = (group + further) % len(groups)
            other = read_or_error(self._feed.dataset, groups, number)
            if not isinstance(other, IntegrityError):
                first = self._feed.first_rows[number]
                return Columns(groups[number], self._feed.dataset, other, first, is_stand_in=True)
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


class Columns:
    """One row group's columns, ready to be picked from without copying."""

    def __init__(
        self,
        group: tuple[Shard, int],
        dataset: Dataset,
        table: Any,
        first_row: int | None = None,
        *,
        is_stand_in: bool = False,
    ) -> None:
        self.first_row = first_row
        """Number of the first row in the split."""
        self.is_stand_in = is_stand_in
        """Whether these rows only fill the places of a row group that cannot be read."""
        self.where = f"{dataset.uri}/{group[0].path}, row group {group[1]}"
        chunks = {name: table.column(name) for name in table.column_names}
        flat = {name: c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for name, c in chunks.items()}
        self.ids = flat["id"]
        self.images, self.paths = flat["image"].field("bytes"), flat["image"].field("path")
        self.masks = flat["mask"].field("bytes") if "mask" in flat and flat["mask"].null_count < len(table) else None
        self.labels = flat.get("label")
        self.nodata = flat.get("nodata")

    def row(self, at: int, draw: int = 0) -> Row:
        """One encoded row; `draw` tells how often the epoch has drawn it before."""
        at %= len(self.ids)  # a stand-in may be shorter
        return Row(
            draw=draw,
            number=None if self.first_row is None else self.first_row + at,
            id=self.ids[at].as_py(),
            path=self.paths[at].as_py(),
            where=self.where,
            image=self.images[at].as_py(),
            mask=None if self.masks is None else self.masks[at].as_py(),
            nodata=None if self.nodata is None else self.nodata[at].as_py(),
            label=None if self.labels is None else self.labels[at].as_py(),
        )


def whole(table: Any) -> Any:
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
    schedule, copy = itertools.tee(reads)
    return schedule, (group for _, fetch, _ in copy for group in fetch)
