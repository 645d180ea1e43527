"""A process of its own that decodes what strangers wrote: no credentials, no core dumps, and its death is an answer.

The two ends talk over pipes: JSON lines, each followed by the bytes that it announces.
"""

import contextlib
import fcntl
import json
import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

from scalecv.errors import ScalecvError

START_S = 120.0
_PIPE_BYTES = 1 << 20
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GDAL_CACHEMAX": "256",  # MB of decoded blocks
    # Pixels of one image after the other: memory that is kept for the next one is not asked from the system again,
    # which costs as much as a third of decoding.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


class SharedMemory:
    """Memory that this process writes and a child reads: bytes take two copies less than through a pipe."""

    def __init__(self, size_bytes: int) -> None:
        self.handle = os.memfd_create("scalecv", os.MFD_CLOEXEC)
        os.ftruncate(self.handle, size_bytes)
        self._memory = mmap.mmap(self.handle, size_bytes)

    def write(self, parts: Iterable[bytes | memoryview]) -> bool:
        """Write from the start on; whether there was room."""
        at = 0
        for part in parts:
            if at + len(part) > len(self._memory):
                return False
            self._memory[at : at + len(part)] = part
            at += len(part)
        return True


class Child:
    """One end of the pipes; the process is started on first use and again after it died or was stopped."""

    def __init__(self, serves: str, shared_bytes: int = 0) -> None:
        """One end for a process that is not started yet.

        Args:
            serves: function that the process runs, as `package.module:function`; see `serving`.
            shared_bytes: of memory that it may read; its number is the function's argument then, -1 where the system
                has none.
        """
        self._serves = serves
        self._shared = SharedMemory(shared_bytes) if shared_bytes and hasattr(os, "memfd_create") else None
        self._takes = "" if not shared_bytes else str(self._shared.handle if self._shared else -1)
        self.process: subprocess.Popen[bytes] | None = None
        self._ahead = b""

    def share(self, parts: Iterable[bytes | memoryview]) -> bool:
        """Lay bytes one after the other where the process sees them, if there is room; else they have to be sent."""
        return self._shared is not None and self._shared.write(parts)

    def send(self, head: Any, parts: Iterable[bytes | memoryview] = ()) -> None:
        """One JSON line and the bytes after it.

        Raises: BrokenPipeError: the process died. ScalecvError: it cannot be started.
        """
        stdin = cast("IO[bytes]", self._started().stdin)
        stdin.write(b"".join([json.dumps(head).encode(), b"\n", *parts]))
        stdin.flush()

    def line(self, timeout_s: float) -> dict[str, Any]:
        """The next JSON line.

        Raises: EOFError: the process died. TimeoutError: it did not answer in time.
        """
        parts, until = [self._ahead], time.monotonic() + timeout_s
        while b"\n" not in parts[-1]:
            parts.append(self._some(until))
        text, _, self._ahead = b"".join(parts).partition(b"\n")
        return cast("dict[str, Any]", json.loads(text))

    def read(self, size_bytes: int, timeout_s: float) -> bytearray:
        """The bytes that a line announced; raises as `line`."""
        out, until = bytearray(self._ahead), time.monotonic() + timeout_s
        while len(out) < size_bytes:
            out += self._some(until)
        self._ahead = bytes(out[size_bytes:])
        del out[size_bytes:]
        return out

    def stop(self) -> int | None:
        """End the process; its exit code, negative for a signal."""
        process, self.process, self._ahead = self.process, None, b""
        if process is None:
            return None
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        if process.poll() is None:
            process.kill()
        code = process.wait()
        if process.stdout is not None:
            process.stdout.close()
        return code

    def _some(self, until: float) -> bytes:
        stdout = cast("IO[bytes]", cast("subprocess.Popen[bytes]", self.process).stdout)
        ready, _, _ = select.select([stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(stdout.fileno(), _PIPE_BYTES)
        if not part:
            raise EOFError
        return part

    def _started(self) -> "subprocess.Popen[bytes]":
        if self.process is None or self.process.poll() is not None:
            self.stop()
            where = str(Path(__file__).parents[2])
            module, _, function = self._serves.partition(":")
            self.process = subprocess.Popen(
                # -P: no module of the folder that it is started in, which may hold what strangers sent.
                [sys.executable, "-P", "-c", f"from {module} import {function}; {function}({self._takes})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._shared.handle,) if self._shared else (),
                # The child decodes what strangers wrote: it gets no credentials.
                env={k: v for k, v in os.environ.items() if k in _KEPT}
                | {"PYTHONPATH": os.pathsep.join([where, *filter(None, sys.path)]), **_ENVIRONMENT},
            )
            with contextlib.suppress(OSError, AttributeError):  # fewer waits for each other, where the system grants it
                fcntl.fcntl(cast("IO[bytes]", self.process.stdin).fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            try:
                self.line(START_S)
            except (EOFError, TimeoutError):
                code = self.stop()
                raise ScalecvError(
                    f"the process that decodes images did not start ({ending(code)}): what it said stands above; "
                    f"`{sys.executable} -P -c 'import {module}'` shows it again"
                ) from None
        return self.process


def serving() -> tuple[IO[bytes], IO[bytes]]:
    """The child's end: where requests come from and where answers go; the first one, that it is ready, is given."""
    import resource
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the answers
    reply(target, {"ready": True})
    return source, target


def reply(target: IO[bytes], answer: Any, data: Any = b"") -> None:
    """One JSON line of the child, and the bytes that it announces."""
    target.write(json.dumps(answer).encode() + b"\n")
    target.write(data)
    target.flush()


def ending(code: int | None) -> str:
    """An exit code in words."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
