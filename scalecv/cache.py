"""Bytes that were read from a bucket, kept on this node's disk for all its processes and runs.

    DIR/scalecv-cache/NAME        what a name stands for, whole; its modification time says when it was last used
                      NAME.part   being fetched: who holds its lock is at it, and loses the lock when he dies
                      NAME.slots  filled in place by several processes at a time (see batches/shared_pixels.py)
                      total       bytes in the folder or more, changed under the lock
                      lock

A name says what the bytes are (their hash, or that of what they are made from), so nothing is ever out of date. Names
are taken back by nobody but the reader, who compares the bytes with the hash that the manifest holds: nothing in this
folder is believed.
What a disk refuses ends the cache of this process with one warning, and never the training.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from scalecv.config import Cache

FOLDER = "scalecv-cache"
PART, SLOTS = ".part", ".slots"
LOW_WATER = 0.9
"""Share of the cap that is left when room is made, so that it is seldom made."""
OWN_BYTES = 4096
"""Set aside for `total` and `lock`."""
WAIT_S = 30.0
"""How long to wait for another process that fetches the same bytes before fetching them too."""
LOCK_S = 10.0
_NAME = re.compile(r"[0-9a-f]{64}[\w.-]{0,40}")
_log = logging.getLogger("scalecv.cache")
_threads = threading.Lock()
"""Threads of one process take turns here; `FileLock` would let them poll."""
_swept: set["NodeCache"] = set()
_off: set["NodeCache"] = set()
"""Caches that this process has given up."""


def user_folder() -> Path:
    """Where what this user's scalecv keeps lies, if no other place is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalecv"


@dataclass(frozen=True)
class NodeCache:
    """A folder of this node with a cap. Plain data: it may go to another process, and to another node's disk."""

    dir: str
    """Absolute path; the files lie in a folder of it."""
    max_bytes: int

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return Path(self.dir, FOLDER)

    @classmethod
    def of(cls, cache: "Cache") -> "NodeCache":
        """The one that an experiment names, or else that of this user."""
        return cls(os.path.abspath(os.path.expanduser(cache.dir or user_folder())), int(cache.max_gb * 1e9))

    def read(self, name: str, size_bytes: int) -> memoryview | None:
        """The bytes of a name, mapped from its file and not compared with anything; None where they are not there."""
        if self in _off:
            return None
        try:
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            if os.fstat(handle).st_size != size_bytes:
                self.drop(name)
                return None
            mapped = mmap.mmap(handle, size_bytes, prot=mmap.PROT_READ)
            with contextlib.suppress(OSError):
                os.utime(handle)
        except (OSError, ValueError):
            return None
        finally:
            os.close(handle)
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
        return memoryview(mapped)

    def drop(self, name: str) -> None:
        """Remove a name, whose bytes are damaged."""
        with self._or_off(), self._locked():
            path = self.folder / name
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                self._set_total(max(0, self._total() - size))

    def slots(self, name: str, slot_bytes: int, most: int) -> int | None:
        """An open file of equal slots, all zeros at first, which processes of this node read and write side by side.

        Args:
            name: what lies in the slots.
            slot_bytes: size of one.
            most: slots that are wanted; fewer where new ones would take more than half of what is free on the disk.

        Returns: a file descriptor; None where the cap allows no slot.
        Raises: OSError: the disk refuses, or others than this user may write into the folder.
        """
        self._enter()
        found = self.folder.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(errno.EPERM, f"{self.folder} can be written by others")
        path = self.folder / (name + SLOTS)
        with self._locked():
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.utime(handle)
                size = os.fstat(handle).st_size
                room = size + shutil.disk_usage(self.folder).free // 2
                fits = min(most, room // slot_bytes) * slot_bytes
                if fits > size and self._has_room(fits - size):
                    os.ftruncate(handle, fits)
                elif size < slot_bytes:
                    path.unlink(missing_ok=True)
                    os.close(handle)
                    return None
            except OSError:
                os.close(handle)
                raise
        return handle

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator["Part | None"]:
        """A place to write a name to, once no other process or thread is at it; afterwards `read` may find it.

        None where the cache cannot be written, or where somebody else takes longer than WAIT_S.
        """
        handle = None
        with self._or_off():
            handle = self._hold(name)
        if handle is None:
            yield None
            return
        part = Part(self, name, handle)
        try:
            yield part
        finally:
            with self._or_off():
                part.close()

    def _hold(self, name: str) -> int | None:
        """An open part that this process holds the lock of."""
        if self in _off:
            return None
        self._enter()
        path, ends = self.folder / (name + PART), time.monotonic() + WAIT_S
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(handle)  # somebody is at it, or was until now
            if time.monotonic() > ends:
                return None
            time.sleep(0.005)

    def _enter(self) -> None:
        """Make the folder, and once in a process remove what dead ones left there."""
        if self not in _swept:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with self._locked():
                self._make_room(0)
            _swept.add(self)

    def _reserve(self, handle: int, size_bytes: int) -> bool:
        """Give a part its size, where the cap allows it."""
        with self._locked():
            if not self._has_room(size_bytes):
                return False
            os.ftruncate(handle, size_bytes)
            return True

    def _has_room(self, size_bytes: int) -> bool:
        """Count bytes that are to come, where the cap allows them after what was used longest ago is gone."""
        total, cap = self._total(), self.max_bytes - OWN_BYTES
        if size_bytes > LOW_WATER * cap:
            return False
        if total + size_bytes > cap:
            total = self._make_room(size_bytes)
        if total + size_bytes > cap:  # others are writing all of it
            return False
        self._set_total(total + size_bytes)  # first: whoever dies here has counted too much, never too little
        return True

    def _make_room(self, size_bytes: int) -> int:
        """Remove what dead processes left, and then what was used longest ago until `size_bytes` fit; the total."""
        found: list[tuple[int, int, str]] = []
        total = 0
        for entry in os.scandir(self.folder):
            if not _NAME.fullmatch(entry.name) or (entry.name.endswith(PART) and _is_left_over(entry.path)):
                continue
            with contextlib.suppress(FileNotFoundError):  # given up in this moment
                stat = entry.stat(follow_symlinks=False)
                total += stat.st_size
                if not entry.name.endswith(PART):
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        cap = self.max_bytes - OWN_BYTES
        if total + size_bytes > cap:
            for _, size, path in sorted(found):
                if total + size_bytes <= LOW_WATER * cap:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        self._set_total(total)
        return total

    def _total(self) -> int:
        try:
            return int((self.folder / "total").read_bytes())
        except (OSError, ValueError):
            return self._make_room(0)

    def _set_total(self, total: int) -> None:
        handle = os.open(self.folder / "total", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(handle, b"%020d" % total, 0)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with _threads, FileLock(self.folder / "lock", timeout=LOCK_S, poll_interval=0.002, mode=0o600):
            yield

    @contextlib.contextmanager
    def _or_off(self) -> Iterator[None]:
        """Give the cache up, and say so once, when the disk refuses something."""
        try:
            yield
        except Timeout:
            pass  # another process is stopped in the wrong moment: this time goes without the cache
        except OSError as error:
            if self not in _off:
                _off.add(self)
                _log.warning(
                    "cache.dir=%s cannot be used (%s): this process reads from the bucket without a cache",
                    self.dir,
                    error.strerror or error,
                )


class Part:
    """A name that is being fetched: nobody else fetches it while this is open."""

    def __init__(self, cache: NodeCache, name: str, handle: int) -> None:
        self._cache, self._name, self._handle = cache, name, handle
        self._is_kept = False

    def keep(self, data: memoryview) -> None:
        """Put the bytes into the cache, whole or not at all, where they have room."""
        cache, path = self._cache, self._cache.folder / self._name
        with cache._or_off():
            if self._is_kept or not cache._reserve(self._handle, len(data)):
                return
            done = 0
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], done)
            with cache._locked():  # whoever counts finds it under one name, neither under both nor under none
                os.replace(str(path) + PART, path)
            self._is_kept = True

    def close(self) -> None:
        """Let others have the name."""
        try:
            if not self._is_kept:
                path = self._cache.folder / (self._name + PART)
                size = os.fstat(self._handle).st_size
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                if size:
                    with self._cache._locked():
                        self._cache._set_total(max(0, self._cache._total() - size))
        finally:
            os.close(self._handle)  # and with it the lock


def _is_left_over(path: str) -> bool:
    """Whether the writer of a part is dead; then the part is gone."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
