"""Open a dataset, read single row groups, check every byte.

A version is a commit of the Delta table whose metadata names the manifest by path and hash. Reading
starts from the manifest alone: one ranged read of a shard's footer, then one of each row group.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scalecv import storage
from scalecv.cache import NodeCache
from scalecv.config import Cache
from scalecv.errors import DataError, IntegrityError, StorageDenied, nearest
from scalecv.shards import manifest as manifests
from scalecv.shards import row_groups
from scalecv.shards.manifest import Manifest, Shard
from scalecv.shards.row_groups import Reads

if TYPE_CHECKING:
    import pyarrow as pa

LOG = "_delta_log"
FACTS = "_facts"
"""Folder below the dataset for manifests, quarantine and notes, each named by its hash."""
_KEY = "scalecv."
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Dataset:
    """One version of a dataset."""

    uri: str
    version: int
    manifest: Manifest
    cache: NodeCache | None = None
    """Where this node keeps the row groups it read; None for a dataset on a local disk."""
    reads: Reads = field(default_factory=Reads, compare=False, repr=False)
    """What the feeds of this dataset have asked storage for."""


def open_dataset(uri: str, version: int | None = None, cache: Cache | None = None) -> Dataset:
    """The newest version of a dataset, or the one asked for.

    Args:
        uri: what was written by an ingest.
        version: None takes the newest.
        cache: what this node keeps of the row groups; a dataset on a local disk is read from there.

    Raises: DataError: nothing there, not a dataset, no such version, or one that another tool wrote.
        StorageDenied: the bucket is missing or refuses these credentials. IntegrityError: a damaged manifest.
    """
    uri = storage.absolute(uri)
    where = storage.without_secrets(uri)
    known = versions(uri)
    if not known:
        raise DataError(_nothing_there(uri))
    chosen = known[-1] if version is None else version
    if chosen not in known:
        raise DataError(f"{where} has no version {version}: it has {known[0]} to {known[-1]}")
    facts = commit_facts(uri, chosen)
    if "manifest" not in facts:
        ours = next((v for v in reversed(known) if v < chosen and "manifest" in commit_facts(uri, v)), None)
        advice = f"open version {ours}, or ingest again into another place" if ours is not None else "ingest first"
        raise DataError(f"{where}: version {chosen} was written by another tool, without a manifest: {advice}")
    if not re.fullmatch(rf"{FACTS}/[0-9a-f]{{64}}\.json", facts["manifest"]) or "manifest_sha256" not in facts:
        raise IntegrityError(f"{where}: the commit of version {chosen} names no manifest below {FACTS}/: restore it")
    path = storage.join(uri, facts["manifest"])
    try:
        data = storage.get(path, sha256=facts["manifest_sha256"])
    except FileNotFoundError:
        raise IntegrityError(f"{path} is gone: restore it, or ingest again into another place") from None
    return Dataset(uri, chosen, manifests.decode(data, path), _cache_of(uri, cache))


def put_facts(uri: str, data: bytes, ending: str) -> tuple[str, str]:
    """Write facts below the dataset, named by their hash.

    Args:
        uri: the dataset.
        data: the whole file.
        ending: `json` or `parquet`.

    Returns: its path below the dataset, and its SHA-256.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{FACTS}/{sha256}.{ending}"
    storage.put(storage.join(uri, path), data)
    return path, sha256


def _cache_of(uri: str, cache: Cache | None) -> NodeCache | None:
    if cache is None or not cache.dir or storage.is_local(uri):
        return None
    return NodeCache.of(cache)


def versions(uri: str) -> list[int]:
    """The versions of the table at a URI, oldest first; none where there is no table."""
    names = storage.list_names(storage.join(uri, LOG))
    return sorted(int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdigit())


def commit_facts(uri: str, version: int) -> dict[str, str]:
    """What a commit's metadata says under scalecv's keys; empty for a commit of another tool."""
    data = storage.get(storage.join(uri, LOG, f"{version:020d}.json"))
    try:
        for line in data.splitlines():
            info = json.loads(line).get("commitInfo") if line.strip() else None
            if info is not None:
                return {k.removeprefix(_KEY): str(v) for k, v in info.items() if k.startswith(_KEY)}
    except (ValueError, AttributeError, RecursionError):
        where = storage.without_secrets(storage.join(uri, LOG))
        raise IntegrityError(f"{where}: commit {version} is damaged: restore it, or open another version") from None
    return {}


def read_row_group(
    uri: str,
    shard: Shard,
    index: int,
    columns: Sequence[str] | None = None,
    cache: NodeCache | None = None,
    reads: Reads | None = None,
) -> "pa.Table":
    """One row group of a shard; only its byte range is read, and the footer once per process.

    The bytes of a whole row group are compared with their SHA-256 in the manifest, those of some columns with the
    checksums of their pages. What is damaged or gone is fetched once more.

    Args:
        uri: the dataset.
        shard: record of the manifest.
        index: place of the row group in the shard.
        columns: columns, or leaves such as image.path; empty means all.
        cache: of this node; columns are read past it.
        reads: counts the requests.

    Raises: IntegrityError: the bytes are not those that were written; names shard and row group.
    """
    try:
        return _read_once(uri, shard, index, columns, cache, reads)
    except IntegrityError:
        if cache is not None:
            cache.drop(row_groups.row_group(shard, index).name)
        return _read_once(uri, shard, index, columns, cache, reads)


def _read_once(
    uri: str, shard: Shard, index: int, columns: Sequence[str] | None, cache: NodeCache | None, reads: Reads | None
) -> "pa.Table":
    path = storage.join(uri, shard.path)
    if columns is not None:
        return _read_columns(path, shard, index, columns)
    (data,) = row_groups.fetch(path, [row_groups.row_group(shard, index)], cache, reads)
    return row_groups.decode(path, shard, index, data, row_groups.footers(path, shard, cache, reads))


def _read_columns(path: str, shard: Shard, index: int, columns: Sequence[str]) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{path}, row group {index}"
    try:
        footer = row_groups.footers(path, shard)
        ranges = _ranges(footer.row_group(index), columns)
        parts = [(start, storage.get_range(path, start, end)) for start, end in ranges]
        file = pa.PythonFile(row_groups.Parts(parts, shard.size_bytes), mode="r")
        opened = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=False)
        table = opened.read_row_group(index, columns=list(columns), use_threads=False)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is gone: restore it, or ingest again into another place") from None
    except (pa.ArrowException, OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise row_groups.damaged(where, error) from None
    if table.num_rows != shard.row_groups[index]:
        raise IntegrityError(f"{where} has {table.num_rows} rows, {shard.row_groups[index]} were written: restore it")
    return table


def read_rows(uri: str, shards: Sequence[Shard], columns: Sequence[str] | None = None) -> "Iterator[pa.Table]":
    """The row groups of some shards, one by one."""
    for shard in shards:
        for index in range(len(shard.row_groups)):
            yield read_row_group(uri, shard, index, columns)


def verify(
    dataset: Dataset, progress: Callable[[int, int], None] = lambda done, total: None, threads: int = 4
) -> list[str]:
    """Read every byte of a version and compare with the manifest; one line per damaged object, none if all is well.

    Args:
        dataset: the version.
        progress: called with bytes done and bytes in all.
        threads: shards that are read at the same time.
    """
    manifest = dataset.manifest
    kept = (manifest.quarantine, manifest.notes, manifest.footprints, manifest.row_facts)
    facts = [f for f in kept if f.path]
    objects = [(s.path, s.size_bytes, s.sha256, s) for s in manifest.shards]
    objects += [(str(f.path), 0, str(f.sha256), None) for f in facts]  # type: ignore[misc]  # no shard
    total, done, problems = sum(s.size_bytes for s in manifest.shards), 0, []
    with ThreadPoolExecutor(threads) as pool:
        for (_, size, _, _), problem in zip(
            objects, pool.map(lambda o: _problem(dataset.uri, *o), objects), strict=True
        ):
            done += size
            progress(done, total)
            if problem:
                problems.append(problem)
    return problems


def _problem(uri: str, path: str, size_bytes: int, sha256: str, shard: Shard | None) -> str | None:
    entry = storage.head(storage.join(uri, path))
    if entry is None:
        return f"{path} is gone"
    if shard is not None and entry.size_bytes != size_bytes:
        return f"{path} has {entry.size_bytes} bytes, {size_bytes} were written"
    digest = hashlib.sha256()
    for start in range(0, entry.size_bytes, _CHUNK):
        try:
            digest.update(storage.get_range(storage.join(uri, path), start, min(start + _CHUNK, entry.size_bytes)))
        except IntegrityError as error:
            return str(error)
    if digest.hexdigest() == sha256:
        return None
    return f"{path} does not have the sha256 it was written with{_which(uri, shard)}"


def _which(uri: str, shard: Shard | None) -> str:
    """The damaged row groups of a shard, in words."""
    bad: list[str] = []
    if shard is None:
        return ""
    for index in range(len(shard.row_groups)):
        try:
            read_row_group(uri, shard, index)
        except IntegrityError:
            bad.append(str(index))
    return f"; damaged row groups: {', '.join(bad)}" if bad else ""


def _ranges(group: Any, columns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Byte ranges of the wanted columns of a row group, neighbours joined."""
    from scalecv.shards.write import column_range

    chunks = [group.column(i) for i in range(group.num_columns)]
    wanted = [c for c in chunks if any(c.path_in_schema == w or c.path_in_schema.startswith(w + ".") for w in columns)]
    start = end = -1
    for low, high in sorted(map(column_range, wanted)):
        if start >= 0 and low > end + (64 << 10):
            yield start, end
            start = -1
        start, end = (low if start < 0 else start), high
    if start >= 0:
        yield start, end


def _nothing_there(uri: str) -> str:
    where = storage.without_secrets(uri)
    names = storage.list_names(uri, limit=5)
    if names:
        return f"{where} is not a dataset: it holds {', '.join(names)}; make one with scalecv ingest {where} --to …"
    above, _, name = uri.rpartition("/")
    try:
        near = nearest(name, storage.list_names(above, limit=1000)) if above and not above.endswith(":/") else ""
    except StorageDenied:
        near = ""
    return f"no dataset at {where}{near}{'' if near else ':'} make one with scalecv ingest SOURCE --to {where}"
