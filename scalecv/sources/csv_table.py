"""A CSV or TSV that lists images: a path, and perhaps label, mask, split, group and further columns.

The table and the listing of the source are joined on disk, so memory stays flat and no image is
asked for one by one. A row whose file is not there has the problem missing.
"""

import contextlib
import csv
import itertools
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from scalecv import storage
from scalecv.errors import ConfigError, DataError, nearest
from scalecv.sources.found import Found, LeftOut, is_image, odd, split_named

PATH_COLUMNS = ("file", "path", "image", "filename", "file_name")
LABEL_COLUMNS = ("label", "class", "class_id", "class_name")
_TABLE_ENDINGS = (".csv", ".tsv")


@dataclass(frozen=True)
class _Columns:
    """Places of the columns in a row; meta are the others by name."""

    path: int
    label: int | None
    mask: int | None
    split: int | None
    group: tuple[int, ...]
    meta: dict[str, int]


def locate(uri: str, name: str | None = None) -> tuple[str, str]:
    """The folder of the images and the name of the table in it.

    Raises: DataError: no table, or several and none named.
    """
    if uri.lower().endswith(_TABLE_ENDINGS):
        folder, _, table = uri.rpartition("/")
        return folder or ("." if "/" not in uri else "/"), table
    tables = [n for n in storage.list_names(uri) if n.lower().endswith(_TABLE_ENDINGS)]
    where = storage.without_secrets(uri)
    if name is not None:
        if name not in tables:
            raise DataError(f"no table {name} in {where}{nearest(name, tables)}")
        return uri, name
    if len(tables) != 1:
        held = ", ".join(tables) or "none"
        raise DataError(f"{where} holds {held}: name the table of the images with --csv NAME")
    return uri, tables[0]


def csv_table(uri: str, csv_name: str | None = None, group: str | None = None) -> Iterator[Found | LeftOut]:
    """The images that a table lists, in its order; paths are below the table's folder or below its parent.

    Args:
        uri: the table, or the folder that holds it.
        csv_name: which table of the folder.
        group: columns, joined by commas, that together name the group.

    A `mask` column names masks. Raises: DataError: no table, no path column, or a row without a path.
    """
    folder, table = locate(uri, csv_name)
    with _text(storage.join(folder, table)) as text, contextlib.closing(sqlite3.connect("")) as listing:
        rows = _rows(csv.reader(text, delimiter="\t" if table.lower().endswith(".tsv") else ","), table)
        columns = _columns(next(rows, []), group, table)
        listing.execute("PRAGMA journal_mode=OFF")
        listing.execute("CREATE TABLE entry (path TEXT PRIMARY KEY, size INT, etag TEXT) WITHOUT ROWID")
        entries = storage.list_entries(folder)
        listing.executemany(
            "INSERT INTO entry VALUES (?, ?, ?)",
            ((e.path, e.size_bytes, e.etag) for e in entries if is_image(e.path) and not odd(e.path)),
        )
        first = list(itertools.islice(rows, 100))
        above = folder.rstrip("/").rpartition("/")[2] + "/"
        cut = above if _fits(listing, first, columns, above) > _fits(listing, first, columns, "") else ""
        seen = 0
        for number, row in enumerate(itertools.chain(first, rows), start=2):
            if not row:
                continue
            seen += 1 if columns.mask is None else 2
            yield _found(listing, row, columns, cut, f"{table}, line {number}")
        if (unlisted := listing.execute("SELECT count(*) FROM entry").fetchone()[0] - seen) > 0:
            yield LeftOut(table, f"about {unlisted} images of the folder are not listed in {table}")


def _rows(reader: Any, table: str) -> Iterator[list[str]]:
    """Raises: DataError: a line that is none of a table, such as a field of more than 128 kB."""
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"{table}, line {reader.line_num}: {error}; is it a table, and are its quotes closed?"
        ) from None


def _found(listing: sqlite3.Connection, row: Sequence[str], columns: _Columns, cut: str, where: str) -> Found | LeftOut:
    def cell(place: int | None) -> str:
        return row[place].strip() if place is not None and place < len(row) else ""

    path = _below(cell(columns.path), cut)
    if not path:
        raise DataError(f"{where}: no path; every row names an image")
    named = cell(columns.split)
    split = split_named(named)
    if named and split is None:
        return LeftOut(path, f"split '{named}' is none of train, val, test")
    mask = _below(cell(columns.mask), cut) or None
    entry, mask_entry = _entry(listing, path), _entry(listing, mask)
    size, etag = entry or (0, "")
    mask_size, mask_etag = mask_entry or (0, "")
    return Found(
        path,
        size,
        etag,
        label=cell(columns.label) or None,
        mask=mask if mask_entry else None,
        mask_size_bytes=mask_size,
        mask_etag=mask_etag,
        group=",".join(cell(i) for i in columns.group) if columns.group else None,
        split=split,
        meta={name: cell(i) for name, i in columns.meta.items()},
        problem="missing" if not entry else "no_mask" if columns.mask is not None and not mask_entry else None,
    )


def _entry(listing: sqlite3.Connection, path: str | None) -> tuple[int, str] | None:
    """Size and etag of a file that the listing holds."""
    row = listing.execute("SELECT size, etag FROM entry WHERE path = ?", (path,)).fetchone()
    return (row[0], row[1]) if row else None


def _columns(header: Sequence[str], group: str | None, table: str) -> _Columns:
    names = [name.strip().lstrip("\ufeff") for name in header]
    lower = [name.lower() for name in names]
    path = next((lower.index(c) for c in PATH_COLUMNS if c in lower), None)
    if path is None:
        raise DataError(
            f"{table} has the columns {', '.join(names) or 'none'}: one must be named {', '.join(PATH_COLUMNS)}"
        )
    label = next((lower.index(c) for c in LABEL_COLUMNS if c in lower), None)
    split = lower.index("split") if "split" in lower else None
    grouped = [part.strip() for part in group.split(",")] if group else []
    for name in grouped:
        if name not in names:
            raise ConfigError(f"--group {name}: {table} has no such column{nearest(name, names)}")
    mask = lower.index("mask") if "mask" in lower else None
    taken = {path, label, mask, split}
    meta = {name: i for i, name in enumerate(names) if i not in taken and name}
    return _Columns(path, label, mask, split, tuple(names.index(name) for name in grouped), meta)


def _fits(listing: sqlite3.Connection, rows: list[list[str]], columns: _Columns, cut: str) -> int:
    """How many of some rows are there if their paths begin with `cut`."""
    found = 0
    for row in rows:
        path = row[columns.path].strip() if columns.path < len(row) else ""
        found += path.startswith(cut) and _entry(listing, _below(path, cut)) is not None
    return found


def _below(path: str, cut: str) -> str:
    return path.removeprefix(cut).removeprefix("./")


@contextlib.contextmanager
def _text(uri: str) -> Iterator[TextIO]:
    """The table as text, from a local copy: it may be larger than memory."""
    entry = storage.head(uri)
    if entry is None:
        raise DataError(f"no table at {storage.without_secrets(uri)}: check the path")
    with tempfile.TemporaryFile() as copy:
        for start in range(0, entry.size_bytes, 8 << 20):
            copy.write(storage.get_range(uri, start, min(start + (8 << 20), entry.size_bytes)))
        copy.seek(0)
        with open(copy.fileno(), encoding="utf-8-sig", errors="replace", newline="", closefd=False) as text:
            yield text
