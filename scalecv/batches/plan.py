"""The order of an epoch, as a pure function of (dataset fingerprint, seed, epoch).

    row groups ── permuted ──▶ sequence of rows ── cut ──▶ LANES equal lanes ── shuffled in windows ──▶ batches

Every global batch takes the same share from each lane, and a rank takes a fixed slice of each batch,
so it reads only the row groups of its own lanes, whole and once, and the ids in a global batch are
the same for any number of ranks. The first windows of an epoch are small, so that its first batch needs few row groups,
and later each lane begins a window at a time of its own, so that reading never comes in bursts.
A dataset that fits into one window is shuffled as a whole.
The position in an epoch is the number of the step; nothing has to be replayed to get there.
Where some rows are to be drawn more often, the sequence is one of draws: as many as rows (see strata.py).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.random import Philox

from scalecv.batches.strata import Line, Strata

LANES = 16


@dataclass(frozen=True)
class Picks:
    """Rows of one step on one rank. n rows."""

    group: np.ndarray
    """int64 [n], number of the row group."""
    row: np.ndarray
    """int64 [n], row in that group."""
    valid: np.ndarray
    """bool [n]; False marks a row that was seen already and only fills the batch."""
    position: np.ndarray
    """int64 [n], place in the global order of the epoch."""
    draw: np.ndarray
    """int64 [n], how often the row was drawn before in this epoch; 0 unless rows are sampled."""


@dataclass(frozen=True)
class Plan:
    """One epoch over row groups of known lengths."""

    group_rows: tuple[int, ...]
    """Rows of each row group, in the order of the manifest."""
    batch: int
    """Rows of one global batch."""
    key: str
    """What the order depends on: fingerprint, split, seed and epoch."""
    shuffle: bool = True
    window_rows: int = 1 << 62
    """Rows among which the order is random, over all lanes together."""
    strata: Strata | None = field(default=None, compare=False)
    """Which rows are drawn more often; None takes each row once."""
    _windows: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    _lane_edges: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def rows(self) -> int:
        """Rows of the epoch."""
        return sum(self.group_rows)

    @cached_property
    def lanes(self) -> int:
        """Equal parts of the epoch that feed each batch side by side; 1 where one window holds everything."""
        return 1 if self._is_one_window else math.gcd(self.batch, LANES)

    @cached_property
    def _is_one_window(self) -> bool:
        return self.rows < LANES or (self.shuffle and self.rows <= self.window_rows)

    @cached_property
    def steps(self) -> int:
        """Global batches of the epoch."""
        return math.ceil(math.ceil(self.rows / self.lanes) / (self.batch // self.lanes))

    @cached_property
    def _sequence(self) -> np.ndarray:
        groups = len(self.group_rows)
        return self._permutation(groups, "groups") if self.shuffle else np.arange(groups)

    @cached_property
    def _line(self) -> Line | None:
        if self.strata is None:
            return None
        return self.strata.line(self.group_rows, self._sequence, self._raw(1, "draws"))

    @cached_property
    def _starts(self) -> np.ndarray:
        """First draw of each row group of the sequence, and the end."""
        if self._line:
            return np.append(self._line.first(self._line.edges[:-1]), self.rows)
        lengths = np.asarray(self.group_rows, np.int64)[self._sequence]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @cached_property
    def _lane_starts(self) -> np.ndarray:
        return np.arange(self.lanes + 1, dtype=np.int64) * self.rows // self.lanes

    @cached_property
    def _lane_window(self) -> int:
        """Rows of one whole window of one lane; a whole number of the lane's share of a batch."""
        share = self.batch // self.lanes
        return self.rows if self._is_one_window else max(1, self.window_rows // self.lanes // share) * share

    def _edges(self, lane: int) -> np.ndarray:
        """First rows of the windows of a lane, and its end: an eighth, an eighth, a quarter, then whole ones."""
        if lane not in self._lane_edges:
            length = int(self._lane_starts[lane + 1] - self._lane_starts[lane])
            edges = np.zeros(1, np.int64)
            if not self._is_one_window:
                share = self.batch // self.lanes
                steps = self._lane_window // share
                first = steps // 2 + (lane + 1) * steps // self.lanes
                later = np.arange(first, -(-length // share), max(1, steps))
                begin = np.array(sorted({0, steps // 8, steps // 4, steps // 2}))  # np.unique would import numpy.ma
                edges = np.concatenate([begin, later[later > begin[-1]]]) * share
            self._lane_edges[lane] = np.append(edges[edges < length], length)
        return self._lane_edges[lane]

    def valid_rows(self, step: int) -> int:
        """Rows of a global batch that count: the whole batch but for the last steps of an epoch."""
        share = self.batch // self.lanes
        lengths = np.diff(self._lane_starts)
        return int(np.clip(lengths - step * share, 0, share).sum())

    def picks(self, step: int, rank: int = 0, ranks: int = 1) -> Picks:
        """The rows of one step that belong to one rank: its slice of the global batch."""
        share, local = self.batch // self.lanes, self.batch // ranks
        slots = np.arange(rank * local, (rank + 1) * local, dtype=np.int64)
        lane = slots // share
        at = step * share + slots % share
        length = np.diff(self._lane_starts)[lane]
        valid = at < length
        inside = np.where(valid, at, length - 1 - (at - length) % np.maximum(length, 1))
        drawn = self._lane_starts[lane] + self._shuffled(lane, inside)
        place = np.searchsorted(self._starts, drawn, side="right") - 1
        group, row, draw = self._sequence[place], drawn - self._starts[place], np.zeros_like(drawn)
        if self._line:
            row, draw = self._line.rows(group, place, drawn)
        return Picks(group, row, valid, step * self.batch + slots, draw)

    def reads(self, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, list[int], list[int]]]:
        """For each step from `start`: (step, row groups to fetch before it, row groups not needed after it)."""
        held: dict[int, int] = {}
        for step in range(start, self.steps):
            needed = self.picks(step, rank, ranks).group
            fetch = [g for g in dict.fromkeys(needed.tolist()) if g not in held]
            for group in fetch:
                held[group] = self._last_step(group, rank, ranks)
            drop = [g for g, last in held.items() if last <= step]
            for group in drop:
                del held[group]
            yield step, fetch, drop

    def _last_step(self, group: int, rank: int, ranks: int) -> int:
        """The last step in which a rank may need a row group."""
        if self._is_one_window:
            return self.steps
        share, local = self.batch // self.lanes, self.batch // ranks
        place = int(self._places[group])
        first, end = int(self._starts[place]), int(self._starts[place + 1])
        last = -1
        for lane in range(rank * local // share, (rank * local + local - 1) // share + 1):
            lane_first, lane_end = int(self._lane_starts[lane]), int(self._lane_starts[lane + 1])
            stop = min(end, lane_end)
            if max(first, lane_first) < stop:
                edges = self._edges(lane)
                window_end = int(edges[np.searchsorted(edges, stop - 1 - lane_first, side="right")])
                last = max(last, (window_end - 1) // share)
        return last

    @cached_property
    def _places(self) -> np.ndarray:
        places = np.empty(len(self.group_rows), np.int64)
        places[self._sequence] = np.arange(len(self.group_rows))
        return places

    def _shuffled(self, lane: np.ndarray, at: np.ndarray) -> np.ndarray:
        if not self.shuffle:
            return at
        window, out = np.empty_like(at), np.empty_like(at)
        for one_lane in dict.fromkeys(lane.tolist()):
            here = lane == one_lane
            window[here] = np.searchsorted(self._edges(one_lane), at[here], side="right") - 1
        for one_lane, one_window in dict.fromkeys(zip(lane.tolist(), window.tolist(), strict=True)):
            here = (lane == one_lane) & (window == one_window)
            first = int(self._edges(one_lane)[one_window])
            out[here] = first + self._window(one_lane, one_window)[at[here] - first]
        return out

    def _window(self, lane: int, window: int) -> np.ndarray:
        if (lane, window) not in self._windows:
            first, end = self._edges(lane)[window : window + 2].tolist()
            if len(self._windows) > 4 * LANES:
                self._windows.clear()
            self._windows[lane, window] = self._permutation(end - first, f"lane {lane} window {window}")
        return self._windows[lane, window]

    def _permutation(self, size: int, what: str) -> np.ndarray:
        """A permutation that no release of numpy changes: raw bits of Philox, sorted."""
        return np.argsort(self._raw(size, what), kind="stable")

    def _raw(self, size: int, what: str) -> np.ndarray:
        return raw_bits(f"{self.key}|{what}", size)


def raw_bits(key: str, size: int) -> np.ndarray:
    """uint64 [size], raw bits of Philox that depend on the key alone; no release of numpy changes them."""
    digest = hashlib.sha256(key.encode()).digest()
    return Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)


def order_key(fingerprint: str, split: str, seed: int, epoch: int) -> str:
    """What the order of an epoch depends on."""
    return f"{fingerprint}|{split}|{seed}|{epoch}"


def order_sum(positions: np.ndarray, ids: list[str], epoch: int) -> int:
    """Sum over rows of SHA-256(epoch, place, id), modulo 2^256.

    It adds up over steps and ranks, and differs when any id stands in another place.
    """
    total = 0
    for position, row in zip(positions.tolist(), ids, strict=True):
        total += int.from_bytes(hashlib.sha256(f"{epoch}|{position}|{row}".encode()).digest(), "little")
    return total % (1 << 256)


def order_hash(total: int) -> str:
    """SHA-256 of a sum of `order_sum`: what `data/order_hash` holds."""
    return hashlib.sha256(f"{total % (1 << 256):x}".encode()).hexdigest()
