"""One unit of work: fetch its objects, examine them, write one shard and one small record.

Runs in a Ray task, or in the caller's process. The shard is named by its content and the record is
written last, so a unit that was cut off leaves nothing that counts and may run again anywhere.
"""

import collections
import errno
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from scalecv import runtime, storage
from scalecv.errors import DataError, IntegrityError, ScalecvError, StorageDenied
from scalecv.schema import META
from scalecv.shards import plan, window_rows
from scalecv.shards.decode import BadImage
from scalecv.shards.examine import Facts
from scalecv.shards.examiner import TOGETHER, Examiner, turns
from scalecv.shards.plan import UnitSettings
from scalecv.shards.record import Record
from scalecv.shards.scene import SceneReader
from scalecv.shards.write import ShardWriter

STAGING = "_ingest"
"""Folder below the dataset for what is under way; gone after the commit."""
_FILES_AT_ONCE = 2
"""Threads that read local files, to begin with: where the page cache has them, more only wait for the interpreter."""
_readers: dict[str, int] = {}
"""Source -> threads that read its local files, where these were too few: a disk that is slow, or far."""
_FETCHES = 32  # an object store answers in 10 to 50 ms: one process needs about this many to keep a core busy
_FILES_AHEAD = 8 * TOGETHER
"""Local files that are read ahead, those of a turn by one thread."""
_AHEAD_BYTES = 64 << 20


def spec_uri(target: str, unit: str) -> str:
    """Where a unit's description lies."""
    return storage.join(target, STAGING, unit + ".unit.gz")


def record_uri(target: str, unit: str) -> str:
    """Where a finished unit's record lies."""
    return storage.join(target, STAGING, unit + ".json")


def overtaken(target: str) -> DataError:
    """Another ingest into the same target was first, and cleared the staging folder."""
    return DataError(
        f"{storage.without_secrets(target)}: another ingest made a version there while this one ran, which changed "
        "nothing: look at it, then run again with --append"
    )


def stage(target: str, uri: str, data: bytes) -> None:
    """Write an object into the staging folder.

    Raises: DataError: another ingest has cleared it meanwhile.
    """
    try:
        storage.put(uri, data)
    except FileNotFoundError:
        raise overtaken(target) from None


def run(item: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Do one unit; a small row that says how it went.

    Args:
        item: `unit`, its name.
        target: URI of the dataset.

    Returns: rows, bad, size_bytes, elapsed_s, reasons and examples (JSON); or error and error_type, its class.
    """
    began = time.monotonic()
    try:
        with runtime.without_collector():
            record = work(target, str(item["unit"]))
    except ScalecvError as error:
        return {**_NOTHING, "unit": item["unit"], "error": str(error), "error_type": type(error).__name__}
    reasons = collections.Counter(bad.reason for bad in record.quarantine)
    return {
        **_NOTHING,
        "unit": item["unit"],
        "rows": record.rows + record.dropped,
        "bad": len(record.quarantine),
        "size_bytes": record.source_bytes,
        "elapsed_s": time.monotonic() - began,
        "reasons": json.dumps(reasons),
        "examples": json.dumps({bad.reason: bad.path for bad in reversed(record.quarantine)}),
    }


_NOTHING: dict[str, Any] = {
    "rows": 0,
    "bad": 0,
    "size_bytes": 0,
    "elapsed_s": 0.0,
    "reasons": "{}",
    "examples": "{}",
    "error": "",
    "error_type": "",
}


def work(target: str, unit: str) -> Record:
    """Do one unit and leave its shard and record below the target."""
    try:
        spec = storage.get(spec_uri(target, unit))
    except FileNotFoundError:
        raise overtaken(target) from None
    split, settings, rows = plan.read_unit(spec)
    record = Record.start(split)
    writer = ShardWriter(settings.meta, settings.row_group_bytes)
    for row, data, mask, sha256, facts in _samples(settings, rows, record):
        if isinstance(facts, BadImage):
            record.reject(row, facts, sha256)
            continue
        record.accept(row, facts, sha256, len(data) + len(mask or b""))
        writer.add(_columns(row, facts, data, mask, sha256, settings.meta))
    closed = writer.close(split)
    if closed is not None:
        content, shard = closed
        storage.put(storage.join(target, shard.path), content)
        record.shard = shard
    stage(target, record_uri(target, unit), record.encode())
    return record


def _samples(settings: UnitSettings, rows: Sequence[dict[str, Any]], record: Record) -> Iterator[tuple[Any, ...]]:
    """Each row, its bytes and those of its mask, their SHA-256, and its facts or why it is set aside."""
    windows = [row for row in rows if settings.tile_px and not row["problem"]]
    if windows:
        yield from window_rows.encoded(settings, windows, record, _scenes())
    files = [row for row in rows if not settings.tile_px or row["problem"]]
    for some in _fetched(settings.source, files):
        record.see(sum(len(data) for _, data, _ in some if isinstance(data, bytes)))
        yield from _examined(some, settings, _examiner())


@lru_cache(maxsize=1)
def _scenes() -> tuple[SceneReader, SceneReader]:
    """Children for scenes and their masks, for all units of a process."""
    return SceneReader(), SceneReader()


@lru_cache(maxsize=1)
def _examiner() -> Examiner:
    """One child for all units of a process."""
    return Examiner()


def close() -> None:
    """End the child process; a further unit starts another one."""
    _examiner().close()
    for reader in _scenes():
        reader.close()


def _columns(
    row: Mapping[str, Any], facts: Facts, data: bytes, mask: bytes | None, sha256: str, meta: Sequence[str]
) -> dict[str, Any]:
    return {
        "id": hashlib.sha256(f"{row['path']}\0{row.get('content', sha256)}".encode()).hexdigest()[:32],
        "sha256": sha256,
        "width": facts["width"],
        "height": facts["height"],
        "bands": facts["bands"],
        "format": facts["format"],
        "nodata": facts["nodata"],
        "label": row["label"],
        "group": row["path"] if row["grp"] is None else row["grp"],
        **{META + name: row["meta"].get(name) for name in meta},
        "image": {"bytes": data, "path": row["path"]},
        "mask": None if mask is None else {"bytes": mask, "path": row["mask"]},
    }


def _examined(some: "Sequence[_Row]", settings: UnitSettings, examiner: Examiner) -> Iterator[tuple[Any, ...]]:
    """For each row: it, its bytes and those of its mask, their SHA-256, and its facts or why it is set aside."""
    whole = [
        (row["path"], data, mask)
        for row, data, mask in some
        if not isinstance(data, BadImage) and not isinstance(mask, BadImage)
    ]
    facts = examiner.examine_all(whole, settings.mask_values, settings.mask_ignore)
    for row, data, mask in some:
        sha256 = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else ""
        bad = next((one for one in (data, mask) if isinstance(one, BadImage)), None)
        yield row, data, mask, sha256, bad or next(facts)


_Fetched = bytes | BadImage
_Row = tuple[dict[str, Any], _Fetched, _Fetched | None]
"""A row, the bytes of its image and of its mask, or why there are none."""


def _fetched(source: str, rows: Sequence[dict[str, Any]]) -> Iterator[list[_Row]]:
    """Rows with their bytes, in order, some at a time; many requests at once, few bytes ahead.

    Objects of a store are asked for one by one. Local files are read by the turn, by few threads while these are ahead.
    """
    is_local = storage.is_local(source)
    at_once = _readers.get(source, _FILES_AT_ONCE) if is_local else _FETCHES
    places, turns_read = threading.Semaphore(at_once), 0

    def fetch(some: Sequence[dict[str, Any]]) -> list[_Row]:
        with places:
            return [(row, *_both(source, row)) for row in some]

    def fetched(futures: Sequence[Future[list[_Row]]]) -> list[_Row]:
        nonlocal at_once, turns_read
        turns_read += 1
        if turns_read > 1 and at_once < _FETCHES and not all(future.done() for future in futures):
            places.release(at_once)
            at_once = _readers[source] = 2 * at_once
        return [row for future in futures for row in future.result()]

    def parts_of(some: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """What one thread reads: a turn of files that are there at once, else so much less that all have some."""
        each = max(1, len(some) * _FILES_AT_ONCE // at_once) if is_local else 1
        return [some[first : first + each] for first in range(0, len(some), each)]

    waiting: collections.deque[tuple[int, int, list[Future[list[_Row]]]]] = collections.deque()
    files = size = 0
    with ThreadPoolExecutor(_FETCHES) as pool:
        try:
            for some in turns(rows, _size):
                some_size = sum(map(_size, some))
                while waiting and (files + len(some) > _FILES_AHEAD or size + some_size > _AHEAD_BYTES):
                    done, done_size, futures = waiting.popleft()
                    files, size = files - done, size - done_size
                    yield fetched(futures)
                waiting.append((len(some), some_size, [pool.submit(fetch, part) for part in parts_of(some)]))
                files, size = files + len(some), size + some_size
            while waiting:
                yield fetched(waiting.popleft()[2])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _size(row: Mapping[str, Any]) -> int:
    return int(row["size"]) + int(row["mask_size"])


def _both(source: str, row: Mapping[str, Any]) -> tuple[_Fetched, _Fetched | None]:
    if row["problem"]:
        reason, _, detail = row["problem"].partition(": ")
        return BadImage(reason, detail or _PROBLEMS[reason]), None
    mask = _object(source, row["mask"], row["mask_size"]) if row["mask"] else None
    if isinstance(mask, BadImage):
        mask = BadImage("mask_damaged" if mask.reason == "unreadable" else "no_mask", f"{row['mask']}: {mask.detail}")
    return _object(source, row["path"], row["size"]), mask


_OF_ONE_FILE = (errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_PROBLEMS = {
    "missing": "listed, but no such file",
    "no_label": "no label, and other images have one",
    "no_mask": "no mask of the same name",
}


def _object(source: str, path: str, size_bytes: int) -> _Fetched:
    try:
        return storage.get(storage.join(source, path), size_bytes)
    except FileNotFoundError:
        return BadImage("missing", "gone since it was listed")
    except (IntegrityError, PermissionError) as error:
        return BadImage("unreadable", str(error))
    except StorageDenied as error:
        raise StorageDenied(f"{error} (reading an image of the source)") from None
    except OSError as error:
        if error.errno not in _OF_ONE_FILE:
            raise
        return BadImage("unreadable", str(error))
