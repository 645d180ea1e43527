"""Row groups of shards: bytes from the node's cache or from storage, compared with the manifest, and decoded."""

import hashlib
import io
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalecv import storage
from scalecv.cache import NodeCache
from scalecv.errors import IntegrityError
from scalecv.shards.manifest import Shard

if TYPE_CHECKING:
    import pyarrow as pa

RANGE_BYTES = 8 << 20
"""Largest request of a row group that is cut into several, which come at the same time."""
FOOTERS_BYTES = 64 << 20
"""Packed footers that a process keeps: 5 kB each for shards of 33 row groups, which take 324 kB when parsed."""
FOOTERS_PARSED = 32


class Reads:
    """What reading has cost so far; all threads of a process add to it."""

    def __init__(self) -> None:
        self.gets = 0
        """Ranges asked for, retries not counted."""
        self.get_bytes = 0
        self.get_s = 0.0
        """Seconds of all of them together, those under way at the same time each counted."""
        self.hits = 0
        """Row groups and footers that came from the node's cache."""
        self.wait_s = 0.0
        """Seconds for which tables were waited for."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Reads, ()  # another process counts for itself

    def add(self, **more: float) -> None:
        """Count some more of the named figures."""
        with self._lock:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)

    def told(self) -> dict[str, float]:
        """The figures by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


@dataclass(frozen=True)
class Piece:
    """Bytes of a shard that are kept together: a row group, or the footer."""

    name: str
    """Their SHA-256; of manifests that lack it, that of the shard and which piece it is."""
    start: int
    end: int
    sha256: str
    """Empty where the manifest lacks it."""


def row_group(shard: Shard, index: int) -> Piece:
    """The bytes of a row group."""
    sha256 = shard.group_sha256[index] if shard.group_sha256 else ""
    return Piece(sha256 or f"{shard.sha256}-{index}", *shard.byte_ranges[index], sha256)


def fetch(
    path: str,
    pieces: Sequence[Piece],
    cache: NodeCache | None = None,
    reads: Reads | None = None,
    memory: memoryview | None = None,
) -> list[memoryview | None]:
    """The bytes of some pieces of one shard, ascending; None in the place of one that has not its SHA-256.

    What the cache lacks is fetched: pieces that touch each other with one request. Pieces that touch and lie in a local
    file may be read into `memory`, if there is no cache.
    Raises: IntegrityError: the shard is gone, or too short.
    """
    if cache is None:
        return _from_storage(path, pieces, reads or Reads(), memory)
    reads, found = reads or Reads(), dict.fromkeys(pieces, None) | _from_cache(pieces, cache)
    with ExitStack() as held:
        # Always ascending: two processes that want the same pieces never wait for each other.
        parts = {piece: held.enter_context(cache.part(piece.name)) for piece in pieces if found[piece] is None}
        found |= _from_cache(list(parts), cache)  # whom we waited for may have brought them
        missing = [piece for piece in parts if found[piece] is None]
        reads.add(hits=len(pieces) - len(missing))
        for piece, data in zip(missing, _from_storage(path, missing, reads), strict=True):
            found[piece], part = data, parts[piece]
            if data is not None and part is not None:
                part.keep(data)
    return [found[piece] for piece in pieces]


def _from_cache(pieces: Sequence[Piece], cache: NodeCache) -> dict[Piece, memoryview | None]:
    """The pieces that the cache holds whole; damaged ones are dropped from it."""
    found: dict[Piece, memoryview | None] = {}
    for piece in pieces:
        data = cache.read(piece.name, piece.end - piece.start)
        if data is not None and not _is_whole(piece, data):
            cache.drop(piece.name)
        elif data is not None:
            found[piece] = data
    return found


def _from_storage(
    path: str, pieces: Sequence[Piece], reads: Reads, memory: memoryview | None = None
) -> list[memoryview | None]:
    found: list[memoryview | None] = []
    first = 0
    while first < len(pieces):
        end = first + 1
        while end < len(pieces) and pieces[end].start == pieces[end - 1].end:
            end += 1
        start = pieces[first].start
        data = _get(path, start, pieces[end - 1].end, reads, memory if end - first == len(pieces) else None)
        for piece in pieces[first:end]:
            part = data[piece.start - start : piece.end - start]
            found.append(part if _is_whole(piece, part) else None)
        first = end
    return found


def _is_whole(piece: Piece, data: memoryview) -> bool:
    return not piece.sha256 or hashlib.sha256(data).hexdigest() == piece.sha256


def _get(path: str, start: int, end: int, reads: Reads, memory: memoryview | None = None) -> memoryview:
    """One range, or several at the same time where it is long: a single connection is slower than the network."""

    def get(first: int, last: int) -> memoryview:
        began = time.perf_counter()
        data = storage.get_range(path, first, last, memory)
        reads.add(gets=1, get_bytes=last - first, get_s=time.perf_counter() - began)
        return data

    try:
        if end - start <= 2 * RANGE_BYTES or storage.is_local(path):
            return get(start, end)
        starts = range(start, end, RANGE_BYTES)
        whole = memoryview(bytearray(end - start))
        with ThreadPoolExecutor(
            min(8, len(starts)), initializer=storage.abandon_when, initargs=(storage.abandoned(),)
        ) as pool:
            for first, part in zip(
                starts, pool.map(lambda at: get(at, min(at + RANGE_BYTES, end)), starts), strict=True
            ):
                whole[first - start : first - start + len(part)] = part
        return whole.toreadonly()
    except FileNotFoundError:
        raise IntegrityError(f"{path} is gone: restore it, or ingest again into another place") from None
    except OSError as error:
        raise damaged(f"{path}, bytes {start} to {end}", error) from None


def decode(path: str, shard: Shard, index: int, data: memoryview | None, footer: Any) -> "pa.Table":
    """A row group as an Arrow table.

    Args:
        path: of the shard, for messages.
        shard: record of the manifest.
        index: place of the row group in the shard.
        data: its bytes; None if they have not the SHA-256 of the manifest.
        footer: of the shard, parsed.
    Raises: IntegrityError: the bytes are not those that were written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{path}, row group {index}"
    if data is None:
        raise damaged(where, ValueError("its SHA-256 is not the one in the manifest"))
    try:
        file = pa.PythonFile(Parts([(shard.byte_ranges[index][0], data)], shard.size_bytes), mode="r")
        opened = pq.ParquetFile(
            file, metadata=footer, page_checksum_verification=not shard.group_sha256, pre_buffer=False
        )
        table = opened.read_row_group(index, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise damaged(where, error) from None
    if table.num_rows != shard.row_groups[index]:
        raise IntegrityError(f"{where} has {table.num_rows} rows, {shard.row_groups[index]} were written: restore it")
    return table


def damaged(where: str, error: Exception) -> IntegrityError:
    """What to say about bytes that cannot be read."""
    lines = str(error).strip().splitlines()
    said = lines[0][:120] if lines else type(error).__name__
    return IntegrityError(f"{where} is damaged ({said}): run `scalecv data verify`, restore it")


class Footers:
    """The footers of shards: each is fetched once by a process, even when several threads ask for it.

    They are kept as packed bytes, and the newest ones parsed. A shard's path holds its hash: they never change.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packed: OrderedDict[str, bytes] = OrderedDict()
        self._packed_bytes = 0
        self._parsed: OrderedDict[str, Any] = OrderedDict()
        self._coming: dict[str, Future[bytes]] = {}

    def cache_clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._packed.clear()
            self._parsed.clear()
            self._packed_bytes = 0

    def __call__(self, path: str, shard: Shard, cache: NodeCache | None = None, reads: Reads | None = None) -> Any:
        """The parsed footer of a shard.

        Raises: IntegrityError: it is damaged, or the shard is gone.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._lock:
            if path in self._parsed:
                self._parsed.move_to_end(path)
                return self._parsed[path]
            packed, coming = self._packed.get(path), self._coming.get(path)
            is_mine = packed is None and coming is None
            if is_mine:
                coming = self._coming[path] = Future()
        if is_mine and coming:
            self._fetch(path, shard, cache, reads, coming)
        if coming:
            try:
                packed = coming.result()
            except storage.Abandoned:  # by who asked first; this one still wants it
                return self(path, shard, cache, reads)
        try:
            parsed = pq.read_metadata(pa.BufferReader(zlib.decompress(packed or b"")))
        except (pa.ArrowException, OSError, ValueError) as error:  # only where the manifest has no hash of it
            self.cache_clear()
            raise damaged(f"{path}, footer", error) from None
        with self._lock:
            self._parsed[path] = parsed
            while len(self._parsed) > FOOTERS_PARSED:
                self._parsed.popitem(last=False)
        return parsed

    def _fetch(
        self, path: str, shard: Shard, cache: NodeCache | None, reads: Reads | None, coming: "Future[bytes]"
    ) -> None:
        start, sha256 = shard.size_bytes - shard.footer_bytes, shard.footer_sha256
        piece = Piece(sha256 or f"{shard.sha256}-footer", start, shard.size_bytes, sha256)
        try:
            (data,) = fetch(path, [piece], cache, reads)
            if data is None:
                raise IntegrityError(f"{path} is damaged in its footer: run `scalecv data verify`, restore it")
            packed = zlib.compress(data, 1)
            with self._lock:
                self._packed[path] = packed
                self._packed_bytes += len(packed)
                while self._packed_bytes > FOOTERS_BYTES:
                    self._packed_bytes -= len(self._packed.popitem(last=False)[1])
            coming.set_result(packed)
        except BaseException as error:
            coming.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._coming[path]


class Parts(io.RawIOBase):
    """A file of which only some ranges are there; reading elsewhere is an error. Nothing is copied."""

    def __init__(self, parts: Sequence[tuple[int, memoryview]], size_bytes: int) -> None:
        self._parts = parts
        self._size = size_bytes
        self._at = 0

    def seekable(self) -> bool:
        """Always."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Byte of the file that is next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the byte that is next."""
        self._at = offset + (0 if whence == io.SEEK_SET else self._at if whence == io.SEEK_CUR else self._size)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next bytes, copied."""
        return bytes(self._next(size))

    def read_buffer(self, size: int = -1) -> Any:
        """What Arrow asks for where it can do without a copy."""
        import pyarrow as pa

        return pa.py_buffer(self._next(size))

    def _next(self, size: int) -> memoryview:
        end = self._size if size < 0 else min(self._at + size, self._size)
        for start, data in self._parts:
            if start <= self._at and end <= start + len(data):
                found = data[self._at - start : end - start]
                self._at = end
                return found
        raise OSError(f"bytes {self._at} to {end} lie outside of the row group")


footers = Footers()
