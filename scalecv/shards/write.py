"""Rows to the bytes of one shard: Parquet with small row groups, the same bytes for the same rows.

Image bytes are stored as they came (no dictionary, no compression: JPEG would gain 2 %), the small
columns stand before them, so that one short range holds a row group's facts. Every page carries a CRC.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scalecv.schema import META
from scalecv.shards.manifest import Shard

if TYPE_CHECKING:
    import pyarrow as pa

_SMALL = ("id", "sha256", "width", "height", "bands", "format", "nodata", "label", "group")


def arrow_schema(meta: Sequence[str]) -> "pa.Schema":
    """Columns of a shard: those of `scalecv.schema`, then `meta_NAME`, then the encoded bytes."""
    import pyarrow as pa

    file = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    number, text = pa.int32(), pa.string()
    kinds = dict.fromkeys(_SMALL, text) | {"width": number, "height": number, "bands": number, "nodata": pa.float64()}
    columns = [*kinds.items(), *((META + name, text) for name in meta), ("image", file), ("mask", file)]
    return pa.schema([pa.field(name, kind) for name, kind in columns])


class ShardWriter:
    """Collects rows into row groups of about `row_group_bytes` of encoded bytes."""

    def __init__(self, meta: Sequence[str], row_group_bytes: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = arrow_schema(meta)
        self._limit = row_group_bytes
        self._held: list[Mapping[str, Any]] = []
        self._held_bytes = 0
        self._counts: list[int] = []
        small = [name for name in self._schema.names if name not in ("image", "mask")]
        paths = [*small, "image.path", "mask.path"]
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            use_dictionary=[name for name in paths if name not in ("id", "sha256", "image.path", "mask.path")],
            compression=dict.fromkeys(paths, "zstd") | {"image.bytes": "none", "mask.bytes": "none"},
            write_statistics=["width", "height", "bands", "label", "group"],
            write_page_checksum=True,
            store_schema=False,
        )

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one row, whose keys are the schema's columns."""
        self._held.append(row)
        self._held_bytes += len(row["image"]["bytes"]) + len((row["mask"] or {}).get("bytes", b""))
        if self._held_bytes >= self._limit:
            self._flush()

    def close(self, split: str) -> tuple[memoryview, Shard] | None:
        """The file and its record, or None if there were no rows."""
        self._flush()
        self._writer.close()
        if not self._counts:
            return None
        data = memoryview(self._sink.getvalue()).cast("B")  # a shard is large: no copy
        return data, describe(data, split)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._held:
            columns = [_column([row[field.name] for row in self._held], field.type) for field in self._schema]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
            self._counts.append(len(self._held))
            self._held, self._held_bytes = [], 0


def _column(values: Sequence[Any], kind: "pa.DataType") -> "pa.Array":
    """Values as Arrow; files by their parts, which takes a third of the time."""
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return pa.array(values, kind)
    parts = [pa.array([None if v is None else v[part.name] for v in values], part.type) for part in kind]
    return pa.StructArray.from_arrays(parts, fields=[*kind], mask=pa.array([v is None for v in values], pa.bool_()))


def describe(data: bytes | memoryview, split: str) -> Shard:
    """The manifest's record of a shard's bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = pq.read_metadata(pa.BufferReader(data))
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    sha256 = hashlib.sha256(data).hexdigest()
    footer_bytes = struct.unpack("<I", data[-8:-4])[0] + 8
    ranges = tuple(_range(group) for group in groups)
    return Shard(
        path=f"split={split}/{sha256}.parquet",
        split=split,
        size_bytes=len(data),
        sha256=sha256,
        row_groups=tuple(group.num_rows for group in groups),
        footer_bytes=footer_bytes,
        byte_ranges=ranges,
        footer_sha256=hashlib.sha256(data[-footer_bytes:]).hexdigest(),
        group_sha256=tuple(hashlib.sha256(data[start:end]).hexdigest() for start, end in ranges),
    )


def column_range(column: Any) -> tuple[int, int]:
    """First byte and end of a column chunk."""
    start = column.data_page_offset
    if column.has_dictionary_page:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size


def _range(group: Any) -> tuple[int, int]:
    chunks = [column_range(group.column(i)) for i in range(group.num_columns)]
    return min(start for start, _ in chunks), max(end for _, end in chunks)
