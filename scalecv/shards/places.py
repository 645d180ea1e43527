"""The footprints of a version: a Parquet file beside the manifest, and what they say about its splits."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scalecv.schema import SPLITS
from scalecv.shards.footprints import Footprints, corners, leaks
from scalecv.shards.manifest import Overlap, Quarantine
from scalecv.shards.record import Record
from scalecv.shards.store import put_facts

_TOGETHER = 10_000


class Places:
    """Collects where rows lie; what stays in memory of a row is its path and its corners."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        kinds = dict.fromkeys(("path", "split", "place"), pa.string()) | {"transform": pa.list_(pa.float64())}
        self._schema = pa.schema(kinds | {"width": pa.int32(), "height": pa.int32()})
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._held: list[Mapping[str, Any]] = []
        self._paths: list[str] = []
        self._places: list[str] = []
        self._kinds: list[int] = []
        self._corners: list[np.ndarray] = []

    def add(self, record: Record) -> None:
        """Take the rows of one unit."""
        self.add_rows({"split": record.split, **found.model_dump()} for found in record.footprints)

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows: path, split, place, transform, width, height."""
        some = list(rows)
        if some:
            self._paths += [row["path"] for row in some]
            self._places += [row["place"] for row in some]
            self._kinds += [SPLITS.index(row["split"]) for row in some]
            quads = [corners(tuple(row["transform"]), row["width"], row["height"]) for row in some]
            self._corners.append(np.array(quads, np.float64))
            self._held += some
        if len(self._held) >= _TOGETHER:
            self._flush()

    def overlaps(self) -> tuple[tuple[Overlap, ...], list[str]]:
        """Splits whose rows lie on each other, and paths of rows of which that is not known in full."""
        if not self._paths or len(set(self._kinds)) < 2:
            return (), []
        found = Footprints(self._paths, self._places, np.concatenate(self._corners), np.array(self._kinds))
        return tuple(Overlap(**told) for told in leaks(found)), [self._paths[row] for row in found.strangers]

    def put(self, uri: str) -> Quarantine:
        """Write the file below the dataset, if some row says where it lies."""
        self._flush()
        self._writer.close()
        if not self._paths:
            return Quarantine()
        path, sha256 = put_facts(uri, self._path.read_bytes(), "parquet")
        return Quarantine(rows=len(self._paths), path=path, sha256=sha256)

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist([dict(row) for row in self._held], schema=self._schema))
        self._held = []
