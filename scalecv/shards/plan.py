"""What an ingest will do: which rows, in which split, in which unit of work; flat in memory.

Rows go through an SQLite table on disk (a file without a name, gone with the process), which sorts
and joins more rows than memory holds. A unit is a run of rows in the order of the hash of their
paths, so any stretch of the dataset is a random sample, wherever the source lies and however it is listed.
"""

import contextlib
import gzip
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scalecv import runtime, storage
from scalecv.errors import ConfigError, StorageError
from scalecv.schema import SPLITS
from scalecv.sources.found import Found, LeftOut, share

UNIT_FORMAT = 1
"""Part of every unit's hash: raise it when shards come out differently."""
CARVED = 0.1
"""Share of the training groups that become val where the source has none."""
_OVERHEAD_BYTES = 1024
_SMALLEST_UNIT_BYTES = 8 << 20
_INSERT = f"INSERT OR IGNORE INTO rows VALUES ({', '.join('?' * 13)})"  # noqa: S608 - question marks only
_NO_META = "{}"
_LATER = ("tile_px", "drop_empty")
_FIELDS = ("path", "size", "etag", "label", "mask", "mask_size", "mask_etag", "grp", "split", "meta", "problem")


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """Turn SQLite's 'disk is full' into one clear error."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(
            f"the list of images does not fit into the temporary folder ({error}): free some space, or set TMPDIR"
        ) from None


@dataclass(frozen=True)
class UnitSettings:
    """What shapes the shards besides the rows."""

    source: str
    kind: str
    meta: tuple[str, ...]
    mask_values: tuple[int, ...]
    mask_ignore: int | None
    row_group_bytes: int
    tile_px: int | None = None
    """Side of the windows that the rows are, where they are windows of scenes."""
    drop_empty: bool = False

    def told(self) -> dict[str, Any]:
        """What goes into hashes; what is not asked for says nothing, so hashes of older releases stay."""
        return {name: value for name, value in self.__dict__.items() if name not in _LATER or value}


@dataclass(frozen=True)
class Unit:
    """One piece of work, described by an object of its own."""

    name: str
    """SHA-256 of the description."""
    spec: bytes
    rows: int
    size_bytes: int


@dataclass(frozen=True)
class Collected:
    """The rows of a source, on disk, and what was left out of them."""

    table: sqlite3.Connection
    meta: tuple[str, ...]
    left_out: dict[str, tuple[int, str]]
    """Why -> how many, and one of them."""


def parse_shares(text: str) -> tuple[float, float, float]:
    """``"80/10/10"`` as shares of train, val and test.

    Raises: ConfigError: not two or three numbers, or none above zero.
    """
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3) or min(parts, default=-1.0) < 0 or not 0 < sum(parts) < float("inf"):
        raise ConfigError(f"--split {text}: expected shares of train/val/test, such as 80/10/10")
    total = sum(parts)
    train, val, test = (*parts, 0.0)[:3]
    return train / total, val / total, test / total


@runtime.without_collector()
@_disk()
def collect(found: Iterable[Found | LeftOut], counted: Callable[[int], None] = lambda n: None) -> Collected:
    """Stream a source's rows to disk; a path that comes twice counts once.

    Args:
        found: the source.
        counted: called now and then with the number of rows so far.
    """
    table = sqlite3.connect("")
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536", "temp_store=FILE"):
        table.execute(f"PRAGMA {pragma}")
    table.execute(
        "CREATE TABLE rows (path TEXT PRIMARY KEY, size INT, etag TEXT, label TEXT, mask TEXT, mask_size INT, "
        "mask_etag TEXT, grp TEXT, split TEXT, meta TEXT, problem TEXT, draw REAL, key BLOB) WITHOUT ROWID"
    )
    left_out: dict[str, tuple[int, str]] = {}
    meta: dict[str, None] = {}
    rows = 0
    for item in found:
        if isinstance(item, LeftOut):
            _count(left_out, item)
            continue
        meta.update(dict.fromkeys(item.meta))
        if table.execute(_INSERT, _line(item)).rowcount == 0:
            _count(left_out, LeftOut(item.path, "listed more than once; the first row counts"))
            continue
        rows += 1
        if rows % 1000 == 0:
            counted(rows)
    counted(rows)
    return Collected(table, tuple(meta), left_out)


@_disk()
def drop(plan: Collected, paths: Iterable[str]) -> int:
    """Take out the rows of these paths; how many there were."""
    return sum(plan.table.execute("DELETE FROM rows WHERE path = ?", (path,)).rowcount for path in paths)


def drop_bad(plan: Collected, source: str, asides: Iterable[Mapping[str, Any]]) -> int:
    """Take out the rows that an earlier version set aside and that would be set aside again; how many there were.

    Args:
        plan: the rows.
        source: where they come from.
        asides: what was set aside: uri, path, stage, reason, size_bytes.
    """
    above, dropped = storage.without_secrets(source), 0
    for aside in asides:
        if aside["uri"] == storage.join(above, aside["path"]):
            stage, reason = aside["stage"], aside["reason"]
            same = (aside["path"], stage, aside["size_bytes"], stage, reason, reason)
            dropped += plan.table.execute(
                "DELETE FROM rows WHERE path = ? AND "
                "((? = 'decode' AND size = ? AND problem IS NULL) OR "
                "(? = 'list' AND (problem = ? OR problem LIKE ? || ':%')))",
                same,
            ).rowcount
    return dropped


def holds(plan: Collected, path: str) -> bool:
    """Whether a path is among the rows."""
    return plan.table.execute("SELECT 1 FROM rows WHERE path = ?", (path,)).fetchone() is not None


def kind_of(plan: Collected) -> str:
    """``mask``, ``label`` or ``image``: what the rows are labelled with; where labels are, rows without one are bad."""
    has_mask, has_label = plan.table.execute(
        "SELECT EXISTS (SELECT 1 FROM rows WHERE mask IS NOT NULL OR problem = 'no_mask'), "
        "EXISTS (SELECT 1 FROM rows WHERE label IS NOT NULL)"
    ).fetchone()
    if has_label and not has_mask:
        plan.table.execute("UPDATE rows SET problem = 'no_label' WHERE label IS NULL AND problem IS NULL")
    return "mask" if has_mask else "label" if has_label else "image"


def labels_of(plan: Collected) -> list[str]:
    """The different labels."""
    return [row[0] for row in plan.table.execute("SELECT DISTINCT label FROM rows WHERE label IS NOT NULL")]


@_disk()
def assign_splits(
    plan: Collected,
    shares: tuple[float, float, float],
    given: bool,
    held: Iterable[tuple[str, str]] | None = None,
) -> list[str]:
    """Give every row a split: the source's own, else its group's, else by the hash of its group; what there is to say.

    Args:
        plan: the rows.
        shares: of train, val and test, for rows without a split.
        given: whether the user asked for these shares.
        held: (group, split) of the version that this one is appended to; a group it holds stays in its split.
    """
    table, said = plan.table, []
    train, val, _ = shares
    table.execute("CREATE TABLE held (grp TEXT, split TEXT, PRIMARY KEY (grp, split)) WITHOUT ROWID")
    table.executemany("INSERT OR IGNORE INTO held VALUES (?, ?)", held or ())
    table.execute(
        "UPDATE rows SET split = (SELECT split FROM held WHERE held.grp = rows.grp LIMIT 1) "
        "WHERE split IS NULL AND grp IN (SELECT grp FROM held)"
    )
    named = {row[0] for row in table.execute("SELECT DISTINCT split FROM rows")} - {None}
    table.execute(
        "UPDATE rows SET split = CASE WHEN draw < ? THEN 'train' WHEN draw < ? THEN 'val' ELSE 'test' END "
        "WHERE split IS NULL",
        (train, train + val),
    )
    carved = CARVED if not given else val / (train + val) if train + val else 0.0
    if "train" in named and "val" not in named and carved:
        table.execute(
            "UPDATE rows SET split = 'val' WHERE split = 'train' AND draw >= ? "
            "AND coalesce(grp, '') NOT IN (SELECT grp FROM held)",
            (1 - carved,),
        )
    if held is None and (carved if named else val) and not _rows(table, "val") and _groups(table, "train") > 1:
        last = table.execute("SELECT max(draw) FROM rows WHERE split = 'train'").fetchone()
        table.execute("UPDATE rows SET split = 'val' WHERE split = 'train' AND draw = ?", last)
    if "train" in named and "val" not in named and (count := _rows(table, "val")):
        said.append(
            f"the source has no val: {count} of {count + _rows(table, 'train')} training images became val, by hash of "
            "their group"
        )
    if not _rows(table, "train"):
        said.append("no training images: this dataset can be evaluated, not trained on")
    elif not _rows(table, "val") and (val or not given):
        said.append("no validation images: give more images, a val folder, or --split 80/10/10")
    leaks = table.execute(
        "SELECT count(*), min(grp) FROM (SELECT grp FROM (SELECT grp, split FROM rows WHERE grp IS NOT NULL "
        "UNION SELECT h.grp, h.split FROM held h JOIN rows r ON r.grp = h.grp) "
        "GROUP BY grp HAVING count(DISTINCT split) > 1)"
    ).fetchone()
    if leaks[0]:
        said.append(f"{leaks[0]} groups lie in more than one split, such as {leaks[1]}: scores there may be too good")
    return said


def totals(plan: Collected) -> tuple[int, int]:
    """Rows, and bytes of images and masks."""
    rows, size = plan.table.execute("SELECT count(*), coalesce(sum(size + mask_size), 0) FROM rows").fetchone()
    return int(rows), int(size)


@_disk()
def ungrouped(plan: Collected) -> tuple[int, int, str]:
    """Groups, rows without one, and the path of one of these rows."""
    groups = plan.table.execute("SELECT count(DISTINCT grp) FROM rows").fetchone()[0]
    without, path = plan.table.execute(
        "SELECT count(*), coalesce(min(path), '') FROM rows WHERE grp IS NULL"
    ).fetchone()
    return int(groups), int(without), str(path)


@runtime.without_collector()
@_disk()
def identity(plan: Collected, settings: UnitSettings, unit_mb: int) -> tuple[str, str]:
    """Hashes of all that makes the dataset: as the store's etags tell it, and by paths and sizes alone."""
    shape = replace(settings, source="")
    head = json.dumps([UNIT_FORMAT, unit_mb, shape.told()], sort_keys=True).encode()
    exact, loose = hashlib.sha256(head), hashlib.sha256(head)
    fields = ("path", "size", "label", "mask", "mask_size", "grp", "split", "meta", "problem")
    for row in plan.table.execute(f"SELECT etag, mask_etag, {', '.join(fields)} FROM rows ORDER BY path"):  # noqa: S608 - constants
        line = json.dumps(row[2:]).encode()
        loose.update(line)
        exact.update(json.dumps(row[:2]).encode() + line)
    return exact.hexdigest(), loose.hexdigest()


def units(plan: Collected, settings: UnitSettings, unit_mb: int) -> Iterator[Unit]:
    """Cut the rows into units, split by split, each of at most `unit_mb` or a sixteenth of its split."""
    for split in SPLITS:
        total = plan.table.execute(
            "SELECT coalesce(sum(size + mask_size + ?), 0) FROM rows WHERE split = ?", (_OVERHEAD_BYTES, split)
        ).fetchone()[0]
        limit = min(unit_mb << 20, max(_SMALLEST_UNIT_BYTES, total // 16))
        yield from _cut(_sorted(plan.table, split), split, settings, limit)


def read_unit(spec: bytes) -> tuple[str, UnitSettings, list[dict[str, Any]]]:
    """Split, settings and rows of a unit's description."""
    tree = json.loads(gzip.decompress(spec))
    settings = tree["settings"]
    settings.update(meta=tuple(settings["meta"]), mask_values=tuple(settings["mask_values"]))
    rows = [dict(zip(tree["fields"], row, strict=True)) for row in tree["rows"]]
    for row in rows:
        row["meta"] = json.loads(row["meta"]) if row["meta"] != _NO_META else {}
    return tree["split"], UnitSettings(**settings), rows


def _cut(rows: Iterator[Sequence[Any]], split: str, settings: UnitSettings, limit: int) -> Iterator[Unit]:
    held: list[Sequence[Any]] = []
    size = 0
    for row in rows:
        weight = row[1] + row[5] + _OVERHEAD_BYTES
        if held and size + weight > limit:
            yield _unit(held, split, settings)
            held, size = [], 0
        held.append(row)
        size += weight
    if held:
        yield _unit(held, split, settings)


def _unit(rows: list[Sequence[Any]], split: str, settings: UnitSettings) -> Unit:
    tree = {"format": UNIT_FORMAT, "split": split, "settings": settings.told(), "fields": _FIELDS, "rows": rows}
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()
    name = hashlib.sha256(text).hexdigest()
    return Unit(name, gzip.compress(text, 1, mtime=0), len(rows), sum(row[1] + row[5] for row in rows))


def _sorted(table: sqlite3.Connection, split: str) -> Iterator[Sequence[Any]]:
    with _disk():
        yield from table.execute(
            f"SELECT {', '.join(_FIELDS)} FROM rows WHERE split = ? ORDER BY key, path",  # noqa: S608 - constants
            (split,),
        )


def _line(item: Found) -> tuple[Any, ...]:
    key = item.key or hashlib.sha256(item.path.encode()).digest()[:8]
    draw = share(item.group if item.group is not None else item.path)
    meta = json.dumps(dict(item.meta), sort_keys=True, ensure_ascii=False) if item.meta else _NO_META
    mask = (item.mask, item.mask_size_bytes, item.mask_etag)
    return (
        *(item.path, item.size_bytes, item.etag, item.label, *mask, item.group, item.split, meta, item.problem),
        *(draw, key),
    )


def _rows(table: sqlite3.Connection, split: str) -> int:
    return int(table.execute("SELECT count(*) FROM rows WHERE split = ?", (split,)).fetchone()[0])


def _groups(table: sqlite3.Connection, split: str) -> int:
    return int(table.execute("SELECT count(DISTINCT draw) FROM rows WHERE split = ?", (split,)).fetchone()[0])


def _count(left_out: dict[str, tuple[int, str]], item: LeftOut) -> None:
    count, example = left_out.get(item.why, (0, item.path))
    left_out[item.why] = (count + 1, example)
