"""What one rank needs to read its share of a split: which rows, in which order, as which pixels.

A feed is a description; an epoch of it (see epoch.py) is what runs.
"""

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from scalecv.batches.collate import Row
from scalecv.batches.decoders import Shared
from scalecv.batches.epoch import Columns, Epoch, whole
from scalecv.batches.gpu import GpuDecoder, hindrance
from scalecv.batches.pixels import Pixels
from scalecv.batches.plan import Picks, Plan, order_key
from scalecv.batches.reader import READERS, Groups, read_or_error
from scalecv.batches.sampling import kinds_of, limited, strata_of
from scalecv.batches.shared_pixels import SharedPixels, open_shared
from scalecv.batches.strata import Strata
from scalecv.cache import NodeCache
from scalecv.config import Sampling
from scalecv.shards.manifest import Shard
from scalecv.shards.store import Dataset


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
    """trainer, cluster, auto or gpu: see batches/decoders.py."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where training happens, which may decode for it."""
    max_bad: float = 0.0
    """Share of the split's rows that training may leave out because they cannot be read."""
    sampling: Sampling = field(default_factory=Sampling)
    """Which rows training draws more often."""
    limit: int | None = None
    """Rows that training uses; None uses all."""
    pixel_cache: NodeCache | None = None
    """Where decoded images are kept for all processes of this node."""
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
    def first_rows(self) -> list[int]:
        """Number of the first row of each of `groups` in the split."""
        starts = itertools.accumulate((s.row_groups[g] for s, g in self._all_groups), initial=0)
        return [start for start, rows in zip(starts, self._chosen, strict=False) if rows is None or len(rows)]

    def open_pixels(self) -> SharedPixels | None:
        """The decoded images of the split that this node keeps; whoever asks closes them."""
        if self.pixel_cache is None or self.gpu:
            return None
        how, whole = self.pixels, bool(self.is_training and self.pixels.augment.resized_crop)
        return open_shared(self.pixel_cache, self.dataset.manifest, self.split, how, whole=whole)

    @cached_property
    def gpu(self) -> GpuDecoder | None:
        """What decodes on the device: for training alone, so that scores do not hang on who decodes."""
        return GpuDecoder(self.pixels, self.device) if self._wants_gpu and not self._hindrance else None

    @cached_property
    def _wants_gpu(self) -> bool:
        return self.decode == "gpu" and self.is_training

    @cached_property
    def _hindrance(self) -> str:
        return hindrance(self.pixels, self.device)

    def notes(self) -> list[str]:
        """What there is to say about who decodes, once."""
        if self.gpu and self.pixel_cache:
            note = "data.decode=gpu: decoded images are not kept (cache.pixels), for the GPU decodes them each time"
            return self._shared.once("gpu", note)
        if self._wants_gpu and self._hindrance:
            return self._shared.once("gpu", f"data.decode=gpu: {self._hindrance}: {self.threads} threads decode")
        return []

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
        return map(whole, READERS[self.reader](self.dataset, self.groups, wanted, None))

    def some_rows(self, most: int) -> list[Row]:
        """Encoded rows from the beginning of the split.

        Raises: IntegrityError: they are damaged.
        """
        groups, rows = self.groups, list[Row]()
        for number in range(len(groups)):
            columns = Columns(groups[number], self.dataset, whole(read_or_error(self.dataset, groups, number)))
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


def threads_per_rank(configured: int | None, ranks_on_node: int) -> int:
    """Threads of one process, for decoding or for the network: as configured, or its share of the cores."""
    return configured or max(1, (os.cpu_count() or 1) // max(1, ranks_on_node))
