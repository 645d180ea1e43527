"""A process of its own that decodes what strangers wrote: no credentials, no core dumps, and its death is an answer.

The two ends talk over pipes: JSON lines, each followed by the bytes that it announces. What the child says is taken for
what a stranger says: lines have a longest length, an answer of another form counts as its death, and nothing of it is
waited for without a limit.
"""

import contextlib
import fcntl
import json
import logging
import mmap
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from scalecv.errors import ScalecvError
from scalecv.jpeg import native

START_S = 120.0
LONGEST_LINE = 64 << 20
"""Bytes: a mask with many values tells each of them."""
_PIPE_BYTES = 1 << 20
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GDAL_CACHEMAX": "256",  # MB of decoded blocks
    # Pixels of one image after the other: memory that is kept for the next one is not asked from the system again,
    # which costs as much as a third of decoding.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "CC", native.SWITCH)
_log = logging.getLogger("scalecv.ingest")
_SIGNAL = "signal "
_SEAL_FUTURE_WRITE = 0x10  # of Linux 5.1, which the fcntl module does not name


class Died(Exception):
    """The process ended, or said what is no answer; the message says which."""


class SharedMemory:
    """Memory that this process writes and a child can only read: bytes take two copies less than through a pipe."""

    def __init__(self, size_bytes: int) -> None:
        """Raises: OSError, AttributeError: the system has no such memory, or none that can be sealed."""
        self.handle = os.memfd_create("scalecv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.handle, size_bytes)
            self._memory = mmap.mmap(self.handle, size_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _SEAL_FUTURE_WRITE
            fcntl.fcntl(self.handle, fcntl.F_ADD_SEALS, seals)  # a child that shrank it would end this process
        except OSError:
            os.close(self.handle)
            raise

    def write(self, parts: Iterable[bytes | memoryview]) -> bool:
        """Write from the start on; whether there was room."""
        at = 0
        for part in parts:
            if at + len(part) > len(self._memory):
                return False
            self._memory[at : at + len(part)] = part
            at += len(part)
        return True

    def close(self) -> None:
        """Give it back."""
        self._memory.close()
        os.close(self.handle)


class Child:
    """One end of the pipes; the process is started on first use and again after it died or was stopped."""

    def __init__(self, serves: str, shared_bytes: int = 0) -> None:
        """One end for a process that is not started yet.

        Args:
            serves: function that the process runs, as `package.module:function`; see `serving`.
            shared_bytes: of memory that it may read; its number is the function's argument then, -1 where the system
                has none.
        """
        self._serves, self._shared_bytes = serves, shared_bytes
        self._shared: SharedMemory | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._ahead = b""
        self._more: dict[str, str] = {}
        """In the environment of the process."""

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A question and its answers. Whatever ends it early ends the process: its next answer would be this one's.

        Raises: Died: also where what was made of an answer shows that it is none (KeyError, TypeError, ValueError).
        """
        is_whole = False
        try:
            yield
            is_whole = True
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise Died(f"gave an answer that is none ({type(error).__name__})") from None
        finally:
            if not is_whole:
                self.stop()

    def share(self, parts: Iterable[bytes | memoryview]) -> bool:
        """Lay bytes one after the other where the process sees them, if there is room; else they have to be sent."""
        self._started()
        return self._shared is not None and self._shared.write(parts)

    def send(self, head: Any, parts: Iterable[bytes | memoryview] = (), timeout_s: float = START_S) -> None:
        """One JSON line and the bytes after it.

        Raises: Died: the process died. TimeoutError: it does not take them. ScalecvError: it cannot be started.
        """
        stdin = cast("IO[bytes]", self._started().stdin).fileno()
        left = memoryview(b"".join([json.dumps(head).encode(), b"\n", *parts]))
        until = time.monotonic() + timeout_s
        while left:
            try:
                left = left[os.write(stdin, left) :]
            except BlockingIOError:
                if not select.select([], [stdin], [], max(0.0, until - time.monotonic()))[1]:
                    raise TimeoutError from None
            except BrokenPipeError:
                raise Died(self._end()) from None

    def line(self, timeout_s: float) -> bytes:
        """The next line.

        Raises: Died: the process died, or the line is too long. TimeoutError: it did not answer in time.
        """
        parts, size, until = [self._ahead], len(self._ahead), time.monotonic() + timeout_s
        while b"\n" not in parts[-1]:
            parts.append(self._some(until))
            size += len(parts[-1])
            if size > LONGEST_LINE:
                raise Died(f"gave an answer of more than {LONGEST_LINE >> 20} MB")
        text, _, self._ahead = b"".join(parts).partition(b"\n")
        return text

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line as JSON; raises as `line`."""
        try:
            return cast("dict[str, Any]", dict(json.loads(self.line(timeout_s))))
        except (ValueError, TypeError, RecursionError):
            raise Died("gave an answer that is none") from None

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

    def close(self) -> None:
        """End the process, and give its memory back; a further question starts another one."""
        self.stop()
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()

    def _end(self) -> str:
        return f"ended with {ending(self.stop())}"

    def _some(self, until: float) -> bytes:
        stdout = cast("IO[bytes]", cast("subprocess.Popen[bytes]", self.process).stdout)
        ready, _, _ = select.select([stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(stdout.fileno(), _PIPE_BYTES)
        if not part:
            raise Died(self._end())
        return part

    def _started(self) -> "subprocess.Popen[bytes]":
        if self.process is None or self.process.poll() is not None:
            self.stop()
            if self._shared_bytes and self._shared is None:
                with contextlib.suppress(OSError, AttributeError):  # a pipe will do
                    self._shared = SharedMemory(self._shared_bytes)
            said = self._start()
            if _SIGNAL in said and not self._more and not native.is_off():  # a broken library ends who loads it
                self._more, first = {native.SWITCH: "0"}, said
                said = self._start()
                if not said:
                    _log.warning(
                        "the process that decodes images does not start with native code (%s) and goes without: if "
                        "%s is there, remove it",
                        first,
                        native.kept_at(),
                    )
            if said:
                module = self._serves.partition(":")[0]
                raise ScalecvError(
                    f"the process that decodes images did not start ({said}): what it said stands above; "
                    f"`{sys.executable} -P -c 'import {module}'` shows it again"
                )
        return cast("subprocess.Popen[bytes]", self.process)

    def _start(self) -> str:
        """Start the process; why it did not start, or nothing."""
        takes = "" if not self._shared_bytes else str(self._shared.handle if self._shared else -1)
        module, _, function = self._serves.partition(":")
        kept = {k: v for k, v in os.environ.items() if k in _KEPT}
        self.process = subprocess.Popen(
            # -P: no module of the folder that it is started in, which may hold what strangers sent.
            [sys.executable, "-P", "-c", f"from {module} import {function}; {function}({takes})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(self._shared.handle,) if self._shared else (),
            # The child decodes what strangers wrote: it gets no credentials.
            env=kept | {"PYTHONPATH": _paths(), **_ENVIRONMENT, **self._more},
        )
        stdin = cast("IO[bytes]", self.process.stdin).fileno()
        os.set_blocking(stdin, False)
        with contextlib.suppress(OSError, AttributeError):  # fewer waits for each other, where the system grants it
            fcntl.fcntl(stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            self.answer(START_S)
        except (Died, TimeoutError) as error:
            self.stop()
            return str(error) or f"no answer after {START_S:g} s"
        return ""


def _paths() -> str:
    """Where the child finds modules beside those of its interpreter.

    That is this package, and what the user's own PYTHONPATH names. Not `sys.path`, on which Ray puts the folder that
    the command was started in.
    """
    here = os.path.realpath(os.getcwd())
    named = filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([str(Path(__file__).parents[2]), *(p for p in named if os.path.realpath(p) != here)])


def serving() -> tuple[IO[bytes], IO[bytes]]:
    """The child's end: where requests come from and where answers go; the first one, that it is ready, is given."""
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the answers
    reply(target, {"ready": True})
    return source, target


def allow(seconds: float) -> None:
    """In the child: that much more CPU time, then the kernel ends it; nobody else would, were its parent gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until, hard = int(used.ru_utime + used.ru_stime + seconds) + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (until if hard == resource.RLIM_INFINITY else min(until, hard), hard))


def reply(target: IO[bytes], answer: Any, data: Any = b"") -> None:
    """One JSON line of the child, and the bytes that it announces."""
    target.write(json.dumps(answer).encode() + b"\n")
    target.write(data)
    target.flush()


def ending(code: int | None) -> str:
    """An exit code in words."""
    return f"{_SIGNAL}{-code}" if code is not None and code < 0 else f"exit code {code}"
