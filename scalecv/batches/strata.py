"""Rows by kind, and draws from them: which kinds an epoch draws more often, in whole numbers and without torch.

A kind with the share p of the rows and the share t of the draws has the weight t / p: so often is a row of it drawn on
average. The rows of an epoch, in its order, stand side by side on a line, each as long as its weight; as many points as
rows lie on the line at equal distances, and each point draws the row it lies on (systematic resampling: Kitagawa 1996).
So a row is drawn floor or ceil of its weight times, and its draws are neighbours.
"""

from dataclasses import dataclass

import numpy as np

STEPS = 1 << 16
"""Weights are whole numbers of such parts: the same on machines whose floats differ in the last bit."""


@dataclass(frozen=True)
class Strata:
    """The kind of each row of a split, and how often its rows are drawn."""

    of: np.ndarray
    """uint16 [rows], number of the kind, in the order of the manifest."""
    weights: np.ndarray
    """int64 [kinds], draws of a row of the kind, on average, times STEPS."""

    def line(self, group_rows: tuple[int, ...], sequence: np.ndarray, raw: np.ndarray) -> "Line":
        """The rows of an epoch side by side.

        Args:
            group_rows: rows of each row group, in the order of the manifest.
            sequence: int64 [groups], row groups in the order of the epoch.
            raw: uint64 [1], random bits.
        """
        sizes = np.asarray(group_rows, np.int64)
        firsts = np.cumsum(sizes) - sizes
        lengths = np.add.reduceat(self.weights[self.of], firsts)
        ends = np.cumsum(lengths[sequence])
        rows = len(self.of)
        start = int(raw[0]) % max(1, int(ends[-1]) // rows)
        return Line(self, firsts, sizes, np.concatenate([np.zeros(1, np.int64), ends]), rows, start)


@dataclass(frozen=True)
class Line:
    """The rows of an epoch side by side, each as long as its weight, and points at equal distances."""

    strata: Strata
    firsts: np.ndarray
    """int64 [groups], number of the first row of each row group, in the order of the manifest."""
    sizes: np.ndarray
    """int64 [groups], rows of each."""
    edges: np.ndarray
    """int64 [groups + 1], where row groups begin and end, in the order of the epoch."""
    points: int
    """As many as there are rows."""
    start: int
    """Where the first point lies."""

    def at(self, draw: np.ndarray) -> np.ndarray:
        """int64 [n], where the points with these numbers lie."""
        each, rest = divmod(int(self.edges[-1]), self.points)
        return np.asarray(self.start + draw * each + draw * rest // self.points)

    def first(self, place: np.ndarray) -> np.ndarray:
        """int64 [n], number of the first point at or behind each place."""
        guess = (place - self.start) * (self.points / max(1, int(self.edges[-1])))
        draw = np.maximum(guess.astype(np.int64) - 2, 0)
        for _ in range(4):
            draw = np.where((draw < self.points) & (self.at(draw) < place), draw + 1, draw)
        return np.asarray(draw)

    def rows(self, group: np.ndarray, order: np.ndarray, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What points draw.

        Args:
            group, order: int64 [n], number of the row group in the manifest, and its place in the epoch.
            draw: int64 [n], numbers of points that lie on it.
        Returns: int64 [n], rows of the row groups; int64 [n], 0 for the first draw of a row, 1 for its second …
        """
        _, some, which = np.unique(order, return_index=True, return_inverse=True)
        firsts, sizes = self.firsts[group[some]], self.sizes[group[some]]
        starts = np.cumsum(sizes) - sizes  # of these row groups, one after the other
        each = self.strata.weights[self.strata.of[np.arange(sizes.sum()) + np.repeat(firsts - starts, sizes)]]
        ends = np.cumsum(each)
        shift = self.edges[order] - (ends - each)[starts][which]
        row = np.searchsorted(ends, self.at(draw) - shift, side="right")
        return row - starts[which], draw - self.first((ends - each)[row] + shift)


def weights(counts: np.ndarray, targets: np.ndarray, most: float) -> np.ndarray:
    """int64 [kinds], draws of a row of each kind, on average, times STEPS.

    Args:
        counts: int64 [kinds], rows of each.
        targets: float64 [kinds], what each is to have of the draws, in any unit; kinds without rows get none.
        most: largest of the draws of a row; what it takes from a kind goes to the others by their part.
    """
    rows = np.maximum(counts, 1)
    wanted = np.where(counts > 0, targets, 0.0)
    each, is_full = np.zeros(len(counts)), np.zeros(len(counts), bool)
    while True:  # at most once for each kind
        left = counts.sum() - most * counts[is_full].sum()
        each = np.where(is_full, most, wanted / max(wanted[~is_full].sum(), 1e-300) * left / rows)
        fuller = is_full | ((each > most) & (counts > 0))
        if (fuller == is_full).all():
            return np.asarray(np.round(each * STEPS).astype(np.int64))
        is_full = fuller
