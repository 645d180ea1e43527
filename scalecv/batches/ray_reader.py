"""Row groups through Ray Data, in the planned order.

Each rank runs a small Ray Dataset of its own, one per epoch: a datasource whose read tasks are runs of row
groups in the order of the plan. Ray places the tasks anywhere in the cluster; `preserve_order` keeps the order.
The tasks ask for no CPU: they wait for storage, and a cluster whose CPUs all train must not starve them
(a Ray Dataset made from rows in memory does starve: it asks for a CPU to look at them).
"""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from scalecv.shards.manifest import Shard
from scalecv.shards.store import Dataset, read_row_group

TASK_BYTES = 32 << 20
TASKS_AT_ONCE = 4
ORDER = "__order"

Numbered = list[tuple[int, Shard, int]]
"""Place in the order, shard, and number of the row group in it."""


class RowGroups(Datasource):  # type: ignore[misc]  # ray is untyped here
    """Row groups in a given order, some in each read task."""

    def __init__(self, uri: str, groups: Numbered) -> None:
        super().__init__()
        self.uri, self.groups = uri, groups

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
            tasks.append(ReadTask(partial(_read, self.uri, some), told))
        return tasks


def stream(dataset: Dataset, groups: list[tuple[Shard, int]], wanted: Iterator[int]) -> Iterator[pa.Table]:
    """Arrow tables of the wanted row groups, in order."""
    numbered = [(place, *groups[group]) for place, group in enumerate(wanted)]
    if not numbered:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every execution, and there is one per epoch
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = TASK_BYTES
    source = RowGroups(dataset.uri, numbered)
    tasks = len(source.get_read_tasks(1))
    reads = ray.data.read_datasource(
        source, num_cpus=0, concurrency=min(tasks, TASKS_AT_ONCE), override_num_blocks=tasks
    )
    blocks = reads.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    pieces = (piece for block in blocks for piece in _by_group(block))
    for place, shard, index in numbered:
        rows, parts = 0, []
        while rows < shard.row_groups[index]:
            found, piece = next(pieces)
            if found != place:
                raise RuntimeError(f"Ray Data gave row group {found} of the plan, {place} was next")
            parts.append(piece)
            rows += len(piece)
        yield pa.concat_tables(parts)


def _by_group(block: Any) -> Iterator[tuple[int, pa.Table]]:
    """The runs of one row group in a block: Ray Data may join and cut what the tasks gave."""
    order, first = block.column(ORDER).to_numpy(), 0
    while first < len(order):
        end = int(order.searchsorted(order[first], side="right"))
        yield int(order[first]), block.slice(first, end - first)
        first = end


def _read(uri: str, groups: Numbered) -> Iterable[pa.Table]:
    """What a read task does: one table for each row group."""
    for place, shard, index in groups:
        table = read_row_group(uri, shard, index)
        yield table.append_column(ORDER, pa.array([place] * len(table), pa.int64()))


def _size(shard: Shard, index: int) -> int:
    first, end = shard.byte_ranges[index]
    return end - first
