"""Row groups through Ray Data, in the planned order.

Each rank runs small Ray Datasets of its own, one after the other: a datasource whose read tasks are runs of row
groups in the order of the plan. Ray places the tasks anywhere in the cluster; `preserve_order` keeps the order.
A Ray Dataset must know its tasks before it starts, and the order of a whole epoch takes long to walk: so each one
covers a stretch of the order, and the next one starts while the last tasks of this one are still read.
The tasks ask for no CPU: they wait for storage, and a cluster whose CPUs all train must not starve them
(a Ray Dataset made from rows in memory does starve: it asks for a CPU to look at them).
"""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from scalecv.cache import NodeCache
from scalecv.errors import IntegrityError
from scalecv.shards.manifest import Shard
from scalecv.shards.store import Dataset, read_row_group
from scalecv.shards.write import arrow_schema

TASK_BYTES = 32 << 20
TASKS_AT_ONCE = 4
FIRST_BYTES = TASKS_AT_ONCE * TASK_BYTES
"""The first stretch is short: nothing can be decoded before it is known."""
STRETCH_BYTES = 1 << 30
ORDER = "__order"
DAMAGE = "__damage"
"""Column that says why a row group cannot be read; null where it can."""

Numbered = list[tuple[int, Shard, int]]
"""Place in the order, shard, and number of the row group in it."""


class RowGroups(Datasource):  # type: ignore[misc]  # ray is untyped here
    """Row groups in a given order, some in each read task."""

    def __init__(self, uri: str, groups: Numbered, meta: tuple[str, ...], cache: NodeCache | None = None) -> None:
        super().__init__()
        self.uri, self.groups, self.meta, self.cache = uri, groups, meta, cache

    def estimate_inmemory_data_size(self) -> int:
        """Encoded bytes of all row groups."""
        return sum(_size(shard, index) for _, shard, index in self.groups)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Tasks of about TASK_BYTES each, whatever parallelism is asked for."""
        tasks: list[ReadTask] = []
        mean = max(1, self.estimate_inmemory_data_size() // max(1, len(self.groups)))
        each = max(1, TASK_BYTES // mean)
        for first in range(0, len(self.groups), each):
            some = self.groups[first : first + each]
            told = BlockMetadata(
                num_rows=sum(shard.row_groups[index] for _, shard, index in some),
                size_bytes=sum(_size(shard, index) for _, shard, index in some),
                input_files=None,
                exec_stats=None,
            )
            tasks.append(ReadTask(partial(_read, self.uri, some, self.meta, self.cache), told))
        return tasks


def stream(
    dataset: Dataset, groups: list[tuple[Shard, int]], wanted: Iterator[int]
) -> Iterator[pa.Table | IntegrityError]:
    """Arrow tables of the wanted row groups, in order; an error in the place of one that is damaged or gone."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every execution, and there are many
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = TASK_BYTES
    numbered = ((place, *groups[group]) for place, group in enumerate(wanted))
    with ThreadPoolExecutor(1, thread_name_prefix="next-stretch") as starter:
        now = _Stretch(dataset, numbered, FIRST_BYTES)
        while now.groups:
            upcoming: _Stretch | None = None
            started: Future[None] | None = None
            for left, told in zip(range(len(now.groups), 0, -1), now.tables(), strict=True):
                if upcoming is None and left <= max(1, len(now.groups) // 2):
                    upcoming = _Stretch(dataset, numbered, STRETCH_BYTES)
                    started = starter.submit(upcoming.start)
                yield told
            if upcoming is None or started is None:
                return
            started.result()
            now = upcoming


class _Stretch:
    """A part of the order, read by one Ray Dataset."""

    def __init__(self, dataset: Dataset, numbered: Iterator[tuple[int, Shard, int]], most_bytes: int) -> None:
        self.groups: Numbered = []
        held = 0
        while held < most_bytes and (one := next(numbered, None)) is not None:
            self.groups.append(one)
            held += _size(one[1], one[2])
        self.pieces: Iterator[tuple[int, pa.Table]] = iter(())
        if self.groups:
            source = RowGroups(dataset.uri, self.groups, dataset.manifest.meta, dataset.cache)
            tasks = len(source.get_read_tasks(1))
            reads = ray.data.read_datasource(
                source, num_cpus=0, concurrency=min(tasks, TASKS_AT_ONCE), override_num_blocks=tasks
            )
            blocks = reads.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
            self.pieces = (piece for block in blocks for piece in _by_group(block))

    def start(self) -> None:
        """Let the tasks run; the first piece is waited for."""
        first = next(self.pieces, None)
        if first is not None:
            rest = self.pieces
            self.pieces = (piece for some in ([first], rest) for piece in some)

    def tables(self) -> Iterator[pa.Table | IntegrityError]:
        """What `stream` gives for this part."""
        for place, shard, index in self.groups:
            rows, parts = 0, []
            while rows < shard.row_groups[index]:
                found, piece = next(self.pieces)
                if found != place:
                    raise RuntimeError(f"Ray Data gave row group {found} of the plan, {place} was next")
                parts.append(piece)
                rows += len(piece)
            damage = parts[0].column(DAMAGE)[0].as_py()
            yield pa.concat_tables(parts) if damage is None else IntegrityError(damage)


def _by_group(block: Any) -> Iterator[tuple[int, pa.Table]]:
    """The runs of one row group in a block: Ray Data may join and cut what the tasks gave."""
    order, first = block.column(ORDER).to_numpy(), 0
    while first < len(order):
        end = int(order.searchsorted(order[first], side="right"))
        yield int(order[first]), block.slice(first, end - first)
        first = end


def _read(uri: str, groups: Numbered, meta: tuple[str, ...], cache: NodeCache | None) -> Iterable[pa.Table]:
    """What a read task does: one table for each row group, of nulls where it cannot be read.

    The cache is that of the node where the task runs.
    """
    schema = arrow_schema(meta)
    for place, shard, index in groups:
        rows, damage = shard.row_groups[index], None
        try:
            table = read_row_group(uri, shard, index, cache=cache)
        except IntegrityError as error:
            damage = str(error)
            table = pa.table([pa.nulls(rows, field.type) for field in schema], schema=schema)
        table = table.append_column(ORDER, pa.array([place] * rows, pa.int64()))
        yield table.append_column(DAMAGE, pa.array([damage] * rows, pa.string()))


def _size(shard: Shard, index: int) -> int:
    first, end = shard.byte_ranges[index]
    return end - first
