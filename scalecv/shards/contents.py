"""What images hold, row by row, and which splits hold the same: a copy in test asks what was learnt by heart in train.

The content of a row is the SHA-256 of its image as it came, of a window that of its pixels: the same picture in another
file format, or one that was changed a little, is another content. An image of one value everywhere has none.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalecv.schema import SPLITS
from scalecv.shards.manifest import Copies, Manifest, Shard
from scalecv.shards.row_facts import contents_of
from scalecv.shards.store import read_row_group

_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("split", "u1")])
_TOGETHER = 1 << 22
"""Rows that are sorted at once, about; more are taken in turns by a part of their content."""
_READ = 1 << 20


class Contents:
    """Collects the contents of the rows of a version on local disk, in the order of its shards."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")
        self._rows = 0

    def copy(self, uri: str, parent: Manifest) -> None:
        """Take over the rows of the version that is appended to."""
        splits = (shard.split for shard in parent.shards for _ in range(shard.rows))
        for some in contents_of(uri, parent):
            self.add(list(islice(splits, len(some))), some.to_pylist())

    def add(self, splits: Sequence[str], contents: Sequence[str | None]) -> None:
        """Take rows, of each its split and its content: an empty one shows nothing, of None it is not known."""
        rows = np.zeros(len(splits), _ROW)
        rows["split"] = [SPLITS.index(split) for split in splits]
        known = [at for at, content in enumerate(contents) if content]
        digits = bytes.fromhex("".join(str(contents[at]) for at in known))
        rows["high"][known], rows["low"][known] = np.frombuffer(digits, ">u8").reshape(-1, 2).T
        self._file.write(rows.tobytes())
        self._rows += len(rows)

    def copies(self, uri: str, shards: Sequence[Shard]) -> tuple[Copies, ...]:
        """For each two splits that hold the same images how many, and one of them.

        Args:
            uri: the dataset.
            shards: of all rows that were added.
        """
        self._file.close()
        if not self._rows:
            return ()
        counts: dict[tuple[int, int], int] = {}
        examples: dict[tuple[int, int], tuple[int, int]] = {}
        for numbers, rows in self._parts():
            for pair, (a, b) in _copied(rows).items():
                counts[pair] = counts.get(pair, 0) + len(b)
                found = int(numbers[a[0]]), int(numbers[b[0]])
                examples[pair] = min(examples.get(pair, found), found)
        return tuple(
            Copies(
                splits=(SPLITS[pair[0]], SPLITS[pair[1]]),
                images=counts[pair],
                example=(_path_of(uri, shards, examples[pair][0]), _path_of(uri, shards, examples[pair][1])),
            )
            for pair in sorted(counts)
        )

    def _parts(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Numbers of rows and the rows; all of one content are in one part."""
        rows = np.memmap(self._path, _ROW, "r")
        parts = math.ceil(len(rows) / _TOGETHER)
        for part in range(parts):
            numbers = []
            for first in range(0, len(rows), _READ):
                high = rows["high"][first : first + _READ]
                numbers.append(first + np.flatnonzero((high != 0) & (high % parts == part)))
            chosen = np.concatenate(numbers)
            yield chosen, rows[chosen]


def _copied(rows: NDArray[Any]) -> dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For two splits that share a content: places in `rows` of the first one's images, and of their copies."""
    _, content = np.unique(rows[["high", "low"]], return_inverse=True)
    holds = np.zeros((content.max(initial=-1) + 1, len(SPLITS)), bool)
    holds[content, rows["split"]] = True
    found = {}
    for one, other in combinations(range(len(SPLITS)), 2):
        shared = (holds[:, one] & holds[:, other])[content]
        if shared.any():
            copies = np.flatnonzero(shared & (rows["split"] == other))
            originals = np.flatnonzero((rows["split"] == one) & (content == content[copies[0]]))
            found[one, other] = (originals, copies)
    return found


def _path_of(uri: str, shards: Sequence[Shard], row: int) -> str:
    """Path in the source of a row, counted over all shards."""
    for shard in shards:
        for group, rows in enumerate(shard.row_groups):
            if row < rows:
                return str(read_row_group(uri, shard, group, ["image.path"]).column("image")[row].as_py()["path"])
            row -= rows
    raise IndexError(row)
