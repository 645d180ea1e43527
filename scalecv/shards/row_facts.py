"""What is known of each row, in one small file of a version: its class or its mask's pixel counts, and its content.

Rows stand in the order of the manifest's shards. The file is named by its hash and written before the commit; the
shards, and so the fingerprint, know nothing of it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scalecv import storage
from scalecv.errors import DataError
from scalecv.shards.manifest import Manifest, RowFacts
from scalecv.shards.record import Record
from scalecv.shards.store import Dataset, put_facts

if TYPE_CHECKING:
    import pyarrow as pa

CONTENT = "content"
_HELD = 1 << 16
"""Rows that are written, and read, at once."""


class RowFactsWriter:
    """Collects the facts of the rows of a version, units in order."""

    def __init__(self, path: Path, kind: str) -> None:
        """Write to a local file; `kind` is that of the rows: label, mask or image."""
        import pyarrow as pa

        numbers = pa.list_(pa.int64())
        fields = {"label": [("label", pa.string())], "mask": [("values", numbers), ("pixels", numbers)]}
        self._schema = pa.schema([*fields.get(kind, []), (CONTENT, pa.string())])
        self._kind, self._path = kind, path
        self._is_whole = True
        """False from the first row of which nothing is known: an older release has counted it."""
        self._has_contents = True
        self._rows: list[tuple[Any, ...]] = []
        self._writer: Any = None

    def copy(self, uri: str, parent: Manifest) -> None:
        """Take over the rows of the version that is appended to; one of an older release may have no contents."""
        import pyarrow as pa

        self._has_contents = parent.row_facts.has_contents
        if not parent.row_facts.path:
            self._is_whole = False
            return
        for table in _tables(uri, parent.row_facts):
            columns = {name: table.column(name) for name in table.column_names} | {CONTENT: contents_in(table)}
            self._write(pa.table(columns).select(self._schema.names).cast(self._schema))

    def add(self, record: Record) -> None:
        """Take the rows of one unit."""
        known: dict[str, list[tuple[Any, ...]]] = {
            "label": [(label,) for label in record.row_labels],
            "mask": [(flat[::2], flat[1::2]) for flat in record.row_masks],
        }
        facts, contents = known.get(self._kind, [()] * record.rows), record.row_contents
        self._is_whole &= record.rows == len(facts) == len(contents)
        self._rows += [(*one, content) for one, content in zip(facts, contents, strict=False)]
        if len(self._rows) >= _HELD:
            self._flush()

    def put(self, uri: str) -> RowFacts:
        """Write the file below the dataset; nothing where some row is unknown."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
        if self._writer is None or not self._is_whole:
            return RowFacts()
        path, sha256 = put_facts(uri, self._path.read_bytes(), "parquet")
        return RowFacts(path=path, sha256=sha256, has_contents=self._has_contents)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = [pa.array(c, f.type) for c, f in zip(zip(*self._rows, strict=True), self._schema, strict=True)]
            self._write(pa.Table.from_arrays(columns, schema=self._schema))
            self._rows = []

    def _write(self, table: "pa.Table") -> None:
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")
        self._writer.write_table(table)


def contents_of(uri: str, manifest: Manifest) -> "Iterator[pa.ChunkedArray]":
    """Content of each row (see contents.py) in the order of the shards, some at a time; null: not known."""
    import pyarrow as pa

    if manifest.row_facts.path:
        yield from (contents_in(table) for table in _tables(uri, manifest.row_facts))
    else:
        yield pa.chunked_array([pa.nulls(manifest.rows, pa.string())])


def contents_in(table: "pa.Table") -> "pa.ChunkedArray":
    """The contents in a table of facts, null where its release kept none."""
    import pyarrow as pa

    if CONTENT in table.column_names:
        return table.column(CONTENT)
    return pa.chunked_array([pa.nulls(len(table), pa.string())])


def classes_of(dataset: Dataset, split: str) -> np.ndarray:
    """int32 [rows of the split], class number of each row, in the order of the manifest.

    Raises: DataError: the dataset was ingested by a release that kept no facts of rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pa.array(dataset.manifest.classes, pa.string())
    parts = [
        pc.index_in(table.column("label"), value_set=names).to_numpy().astype(np.int32)
        for table in _of_version(dataset)
    ]
    return _of_split(np.concatenate(parts), dataset.manifest, split)


def foreground_of(dataset: Dataset, split: str) -> np.ndarray:
    """float32 [rows of the split], share of each row's labelled pixels that show another class than the first.

    Raises: DataError: the dataset was ingested by a release that kept no facts of rows.
    """
    background = dataset.manifest.mask_values[0]
    parts = [_foreground(table, background, dataset.manifest.mask_ignore) for table in _of_version(dataset)]
    return _of_split(np.concatenate(parts), dataset.manifest, split)


def _foreground(table: "pa.Table", background: int, ignore: int | None) -> np.ndarray:
    values, pixels = (table.column(name).combine_chunks() for name in ("values", "pixels"))
    ends = values.offsets.to_numpy().astype(np.int64)
    value, count = values.values.to_numpy(), pixels.values.to_numpy().astype(np.int64)
    labelled = np.where(value == ignore, 0, count) if ignore is not None else count

    def sums(of: np.ndarray) -> np.ndarray:
        running = np.concatenate([np.zeros(1, np.int64), np.cumsum(of)])
        return np.asarray(running[ends[1:]] - running[ends[:-1]])

    shown = sums(np.where(value == background, 0, labelled))
    return np.asarray(shown / np.maximum(1, sums(labelled)), np.float32)


def _of_version(dataset: Dataset) -> "Iterator[pa.Table]":
    facts = dataset.manifest.row_facts
    if not facts.path:
        raise DataError(unknown(storage.without_secrets(dataset.uri)))
    return _tables(dataset.uri, facts)


def unknown(where: str) -> str:
    """What to say of a dataset whose rows are not known one by one."""
    return (
        f"{where} was ingested before classes and mask shares of single rows were kept: ingest the source again into "
        "another place with `scalecv ingest`, or leave out data.sampling and data.limit"
    )


def _tables(uri: str, facts: RowFacts) -> "Iterator[pa.Table]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = storage.get(storage.join(uri, str(facts.path)), sha256=facts.sha256)
    for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(_HELD):
        yield pa.Table.from_batches([batch])


def _of_split(rows: np.ndarray, manifest: Manifest, split: str) -> np.ndarray:
    ends = np.cumsum([shard.rows for shard in manifest.shards])
    parts: Sequence[np.ndarray] = [
        rows[end - shard.rows : end] for shard, end in zip(manifest.shards, ends, strict=True) if shard.split == split
    ]
    return np.concatenate(parts)
