"""Decoded images of a split on this node's disk, for all its processes: whoever needs one first decodes it for all.

    DIR/scalecv-cache/NAME.slots    slot 0 | slot 1 | …    one for each row, in the order of the manifest

Kept is what is the same in all epochs of all runs (`slots.Fixed`), and NAME is the hash of all that it depends on. A
slot counts where its checksum fits: what a crash, a full disk or two writers left is decoded again. Who decodes a row
holds a lock on its slot, which ends with the process; others take other rows meanwhile, so that runs side by side share
the work. Slots are read into the batch and not mapped: a file that is cut short ends no process.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from scalecv.batches.pixels import Pixels
from scalecv.batches.slots import Fixed, Layout, layout_of
from scalecv.cache import NodeCache
from scalecv.jpeg import turbo
from scalecv.shards.manifest import Manifest

FORMAT = 1
SHARE = 0.5
"""Of the cap of the cache for all splits together; the rest is for row groups."""
LEFT_OUT = ("augment", "size_px", "resize", "sides_px")
"""Of `Pixels`, what comes after the slot, or stands in its layout."""
PATIENCE_S = 2.0
"""How long the rows that other processes decode are waited for before they are decoded here too."""
LOOK_S = 0.001
_log = logging.getLogger("scalecv.cache")
_off: set[NodeCache] = set()
"""Caches whose disk refused something to this process, which keeps nothing more there."""


class SharedPixels:
    """The open file of one split, for one epoch; closing it leaves to others what is in it."""

    def __init__(self, cache: NodeCache, handle: int, rows: int, layout: Layout, *, whole: bool) -> None:
        """Take over an open file."""
        self.layout = layout
        self.slots = min(rows, os.fstat(handle).st_size // layout.slot_bytes)
        """Rows from the first one on that have a slot."""
        self.taken = self.decoded = 0
        """Rows that were there, and that this process decoded."""
        self.whole = whole
        """Whether rows are kept at their own size."""
        self.told = f"decoded images of {self.slots} of {rows} rows are kept for all runs of this node: {cache.folder}"
        """For whoever trains."""
        self._cache, self._handle, self._lock, self._claimed = cache, handle, threading.Lock(), set[int]()

    def has(self, row: Any) -> bool:
        """Whether a `Row` has a slot.

        Of a JPEG the crop alone is decoded, which takes no longer than reading the whole picture and resizing the crop.
        """
        is_cut = self.whole and row.mask is None and turbo.header(row.image) is not None
        return row.number is not None and row.number < self.slots and not is_cut

    def each(
        self,
        numbers: dict[int, int],
        place: Callable[[int], torch.Tensor],
        decode: Callable[[int], Fixed],
    ) -> Iterator[tuple[int, Fixed]]:
        """Rows as soon as they are there, each of them once; those that other processes are at come last.

        Args:
            numbers: number in the split of each row, by its place in the batch.
            place: where the image of a place may be written, [C, H, W] with memory order H, W, C.
            decode: makes the row of a place.
        """
        later: list[int] = []
        for at in numbers:
            found = self._now(at, numbers[at], place, decode)
            if found is None:
                later.append(at)
            else:
                yield at, found
        ends = time.monotonic() + PATIENCE_S
        for at in later:
            while (found := self._now(at, numbers[at], place, decode)) is None:
                if time.monotonic() > ends:
                    found = self._made(at, decode)
                    break
                time.sleep(LOOK_S)
            yield at, found

    def _now(
        self, at: int, number: int, place: Callable[[int], torch.Tensor], decode: Callable[[int], Fixed]
    ) -> Fixed | None:
        """A row that is there, or is decoded now; None where another process is at it."""
        out = place(at)
        if found := self.read(number, out):
            return found
        if not self._claim(number):
            return None
        try:
            if not (found := self.read(number, out)):  # it may have come in this moment
                found = self._made(at, decode)
                self.write(number, found)
            return found
        finally:
            self._release(number)

    def _made(self, at: int, decode: Callable[[int], Fixed]) -> Fixed:
        with self._lock:
            self.decoded += 1
        return decode(at)

    def read(self, number: int, out: torch.Tensor) -> Fixed | None:
        """A row, its image written into `out`; None where it is not there whole."""
        room = self.layout.room(out)
        try:
            if os.preadv(self._handle, room, number * self.layout.slot_bytes) != self.layout.slot_bytes:
                return None
        except OSError:
            return None
        found = self.layout.unpack(room, out)
        with self._lock:
            self.taken += found is not None
        return found

    def write(self, number: int, row: Fixed) -> None:
        """Put a row into its slot, unless it has another size than the slots have."""
        pieces = self.layout.pack(row)
        if pieces is None or self._cache in _off:
            return
        try:
            if os.pwritev(self._handle, pieces, number * self.layout.slot_bytes) != self.layout.slot_bytes:
                raise OSError("no space left")
        except OSError as error:
            give_up(self._cache, error)

    def _claim(self, number: int) -> bool:
        """Lock a slot; False where another thread or process has it."""
        with self._lock:  # the lock of a file is one for all threads of a process
            if number in self._claimed:
                return False
            self._claimed.add(number)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number * self.layout.slot_bytes)
        except (BlockingIOError, PermissionError):
            self._claimed.discard(number)
            return False
        except OSError as error:  # a disk without locks: some rows are decoded twice
            give_up(self._cache, error)
        return True

    def _release(self, number: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, number * self.layout.slot_bytes)
        self._claimed.discard(number)

    def close(self) -> None:
        """Close the file; nobody may use it any more."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def open_shared(
    cache: NodeCache, manifest: Manifest, split: str, how: Pixels, *, whole: bool = False
) -> SharedPixels | None:
    """The file of a split, made if it is not there.

    Args:
        cache: where; all splits of a dataset take up to SHARE of its cap, each in proportion to its rows.
        manifest: of the dataset.
        split: whose rows.
        how: what a batch holds.
        whole: whether rows are kept at their own size.

    Returns: None where rows have several sizes, where the cap allows no row, or where the disk refuses, which is said
        once in a process.
    """
    layout = layout_of(how, manifest, whole=whole)
    if layout is None:
        return None
    rows = manifest.splits[split]
    room = SHARE * cache.max_bytes * rows / sum(manifest.splits.values())
    name = _name(manifest, split, how, layout)
    try:
        handle = cache.slots(name, layout.slot_bytes, min(rows, int(room / layout.slot_bytes)))
    except OSError as error:
        give_up(cache, error)
        return None
    return None if handle is None else SharedPixels(cache, handle, rows, layout, whole=whole)


def give_up(cache: NodeCache, error: OSError) -> None:
    """Keep no more of what this process decodes, and say so once."""
    if cache not in _off:
        _off.add(cache)
        why = error.strerror or error
        _log.warning("%s cannot keep decoded images (%s): this process decodes for itself", cache.folder, why)


def _name(manifest: Manifest, split: str, how: Pixels, layout: Layout) -> str:
    """SHA-256 of all that decides what stands in which slot."""
    resized = layout.shape[:2] == (how.size_px, how.size_px)
    about = {name: value for name, value in vars(how).items() if name not in LEFT_OUT}
    shards = [(shard.path, shard.row_groups) for shard in manifest.shards_of(split)]
    told = [FORMAT, shards, about, how.resize if resized else "", dataclasses.asdict(layout), *_software()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@lru_cache(maxsize=1)
def _software() -> tuple[str, ...]:
    """What decodes and resizes here: another release, or another kind of processor, may round otherwise."""
    names = ("scalecv", "torch", "torchvision", "pillow", "simplejpeg", "rasterio", "numpy")
    return _processor(), *(f"{name} {importlib.metadata.version(name)}" for name in names)


def _processor() -> str:
    """What code that is made for several kinds of processor may choose by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("".join(told).encode()).hexdigest()
