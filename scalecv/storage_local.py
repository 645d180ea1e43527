"""Storage on this machine: files that are whole or absent, durable when a call returns."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from stat import S_ISREG

from filelock import FileLock

from scalecv.errors import StorageDenied, StorageError
from scalecv.storage_place import Entry

PART = ".part-"
"""What the name of a file begins with that is still being written, or whose writer died."""
_READ_BYTES = 64 << 20
_ATTEMPTS = 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def head(path: str) -> Entry | None:
    """Size and etag of a file, or None where there is none."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Entry(os.path.basename(path), stat.st_size, _etag(stat)) if S_ISREG(stat.st_mode) else None


def get(path: str) -> bytes:
    """The bytes of a file, in few calls: each of them lets another thread take the interpreter, and waits for it."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        data = os.read(handle, size + 1)
        if len(data) == size:
            return data
        parts = [data]  # it grows, has no size of its own, or is beyond one read
        while parts[-1]:
            parts.append(os.read(handle, _READ_BYTES))
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(handle)
    return b"".join(parts)


def get_range(path: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file; fewer where it ends before."""
    with open(path, "rb") as file:
        return os.pread(file.fileno(), end - start, start)


def read_into(path: str, start: int, memory: memoryview) -> int:
    """Fill memory with the bytes of a file from `start` on; how many there were."""
    with open(path, "rb", buffering=0) as file:
        return os.preadv(file.fileno(), [memory], start)


def put(path: str, data: bytes | memoryview) -> None:
    """Write a file over what was there."""
    with _written(path, data) as part:
        os.replace(part, path)


def put_if_absent(path: str, data: bytes) -> bool:
    """Write a file only where there is none; False if there was one."""
    with _written(path, data) as part:
        try:
            os.link(part, path)
        except FileExistsError:
            return False
    return True


def put_if_match(path: str, data: bytes, etag: str) -> bool:
    """Write over a file only while it still has `etag`; False if it changed."""
    with FileLock(path + ".lock"):
        now = head(path)
        if now is None or now.etag != etag:
            return False
        put(path, data)
    return True


def delete(path: str) -> None:
    """Remove a file, and its folder where that is empty then; no error where there is none."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))  # only an empty folder goes


def entries(folder: str) -> Iterator[Entry]:
    """The files below a folder, in the order an object store gives, hidden ones left out."""
    if not os.path.isdir(folder):
        raise StorageDenied(f"no folder at {folder}: check the path")
    try:
        yield from _walk(folder, "")
    except PermissionError as error:
        raise StorageDenied(f"{error.filename}: {error.strerror}; check its rights") from None


def names(folder: str) -> list[str]:
    """What lies directly in a folder, sorted; empty where there is none."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        if os.path.isdir(folder):
            raise
        return []


@contextlib.contextmanager
def _written(path: str, data: bytes | memoryview) -> Iterator[str]:
    """A durable temporary file beside `path`, removed unless it was moved away; then the folder is made durable."""
    folder = os.path.dirname(path)
    try:
        handle, part = _new_part(folder)
    except OSError as error:
        raise _failure(path, error, len(data)) from None
    try:
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
        except OSError as error:
            raise _failure(path, error, len(data)) from None
        yield part
        _sync_folder(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _new_part(folder: str) -> tuple[int, str]:
    """An open file and its path; the folder is made, also where somebody removes it meanwhile because it is empty."""
    for attempt in range(_ATTEMPTS):
        try:
            return tempfile.mkstemp(dir=folder, prefix=PART)
        except (FileNotFoundError, NotADirectoryError):
            _make_folder(folder)
            time.sleep(0.001 * attempt)
    return tempfile.mkstemp(dir=folder, prefix=PART)


def _make_folder(folder: str) -> None:
    """Make a folder and those above it that lack, each name durable."""
    if folder and not os.path.isdir(folder):
        above = os.path.dirname(folder)
        _make_folder(above)
        with contextlib.suppress(FileExistsError):  # somebody else was faster; a file in its place shows below
            os.mkdir(folder)
        _sync_folder(above or ".")


def _sync_folder(folder: str) -> None:
    """Make a new name survive a power cut; what comes later may rely on it being there."""
    with contextlib.suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _failure(path: str, error: OSError, needed_bytes: int) -> Exception:
    """A full or forbidden disk as one clear error; any other error as it is."""
    if error.errno in _FULL:
        free = shutil.disk_usage(_existing(os.path.dirname(path))).free
        limit = " (a limit on the size of files is set)" if error.errno == errno.EFBIG else ""
        return StorageError(
            f"{path}: no space left to write there, {needed_bytes:,} bytes are needed and {free:,} are free{limit}: "
            "make room, and the same command goes on"
        )
    if error.errno in _REFUSALS:
        return StorageDenied(f"{path}: {error.strerror}; check the path and its rights")
    return error


def _existing(folder: str) -> str:
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"


def _walk(folder: str, prefix: str) -> Iterator[Entry]:
    with os.scandir(folder) as found:
        named = [(e.name + "/" if e.is_dir() else e.name, e) for e in found if not e.name.startswith(".")]
    for name, entry in sorted((name, e) for name, e in named if name.endswith("/") or e.is_file()):
        if name.endswith("/"):
            yield from _walk(entry.path, prefix + name)
        else:
            stat = entry.stat()
            yield Entry(prefix + name, stat.st_size, _etag(stat))
