"""Examination in a process of its own, whose death is itself a reason to set a sample aside.

The two ends talk over pipes: one JSON line, then the bytes it announces; one JSON line back. Small samples go many at
a time, for a turn of both processes costs as much as a small image. After a death or a time-out those of that turn
go one by one, so that it is always one sample's own.
"""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from scalecv.shards.decode import REASONS, BadImage, Reason
from scalecv.shards.examine import Facts, examine

TIMEOUT_S = 60.0
START_S = 120.0
TOGETHER_BYTES = 1 << 20
"""Bytes of the samples that are sent in one turn; a larger one goes alone."""
TOGETHER = 64
"""Samples of one turn."""
_PIPE_BYTES = 1 << 20
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Pixels of one image after the other: memory that is kept for the next one is not asked from the system again,
    # which costs as much as a third of decoding.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}

T = TypeVar("T")
Sample = tuple[str, bytes, bytes | None]
"""Name, encoded image, encoded mask."""


class Examiner:
    """A child process that decodes; it is started on first use and again after it died."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """Args: timeout_s: time for one sample before its process is killed."""
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None

    def examine(
        self, name: str, data: bytes, mask: bytes | None = None, declared: Sequence[int] = (), ignore: int | None = None
    ) -> Facts:
        """As `scalecv.shards.examine.examine`; also the reasons decoder_died and timeout."""
        answer = self._alone((name, data, mask), declared, ignore)
        if isinstance(answer, BadImage):
            raise answer
        return answer

    def examine_all(
        self, samples: Sequence[Sample], declared: Sequence[int] = (), ignore: int | None = None
    ) -> Iterator[Facts | BadImage]:
        """The facts of each sample, or why it is set aside; in order."""
        for some in turns(samples, lambda sample: len(sample[1]) + len(sample[2] or b"")):
            if len(some) == 1:
                yield self._alone(some[0], declared, ignore)
                continue
            try:
                yield from map(_read, self._asked(some, declared, ignore))
            except (BrokenPipeError, EOFError, TimeoutError):
                self._stop()
                for sample in some:
                    yield self._alone(sample, declared, ignore)

    def close(self) -> None:
        """End the child."""
        self._stop()

    def _alone(self, sample: Sample, declared: Sequence[int], ignore: int | None) -> Facts | BadImage:
        try:
            return _read(self._asked([sample], declared, ignore)[0])
        except (BrokenPipeError, EOFError):
            return BadImage("decoder_died", f"the decoder ended with {_ending(self._stop())}")
        except TimeoutError:
            self._stop()
            return BadImage("timeout", f"not decoded after {self._timeout_s:g} s")

    def _asked(self, samples: Sequence[Sample], declared: Sequence[int], ignore: int | None) -> list[dict[str, Any]]:
        """One answer for each sample.

        Raises: BrokenPipeError, EOFError: the child died. TimeoutError: it did not answer in time.
        """
        child = self._started()
        lengths = [(name, len(data), None if mask is None else len(mask)) for name, data, mask in samples]
        head = json.dumps({"samples": lengths, "declared": list(declared), "ignore": ignore})
        stdin = cast("IO[bytes]", child.stdin)
        stdin.write(b"".join([head.encode(), b"\n", *(part for _, *both in samples for part in both if part)]))
        stdin.flush()
        answers = self._answer(child, self._timeout_s)["answers"]
        return cast("list[dict[str, Any]]", answers)

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self._stop()
            where = str(Path(__file__).parents[2])
            keep = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
            self._child = subprocess.Popen(
                [sys.executable, "-c", "from scalecv.shards.examiner import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # The child decodes what strangers wrote: it gets no credentials.
                env={k: v for k, v in os.environ.items() if k in keep}
                | {"PYTHONPATH": os.pathsep.join([where, *filter(None, sys.path)]), **_ENVIRONMENT},
            )
            with contextlib.suppress(OSError, AttributeError):  # fewer waits for each other, where the system grants it
                fcntl.fcntl(cast("IO[bytes]", self._child.stdin).fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._answer(self._child, START_S)
        return self._child

    def _answer(self, child: "subprocess.Popen[bytes]", timeout_s: float) -> dict[str, Any]:
        stdout = cast("IO[bytes]", child.stdout)
        until, parts = time.monotonic() + timeout_s, [b""]
        while not parts[-1].endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError
            parts.append(part)
        return cast("dict[str, Any]", json.loads(b"".join(parts)))

    def _stop(self) -> int | None:
        child, self._child = self._child, None
        if child is None:
            return None
        if child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
        if child.poll() is None:
            child.kill()
        code = child.wait()
        if child.stdout is not None:
            child.stdout.close()
        return code


def serve() -> None:
    """The child's end: answers until its input ends."""
    import resource
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the answers
    _reply(target, {"ready": True})
    while line := source.readline():
        head = json.loads(line)
        samples = [
            (name, source.read(size), None if mask_size is None else source.read(mask_size))
            for name, size, mask_size in head["samples"]
        ]
        _reply(target, {"answers": [_examined(*sample, head["declared"], head["ignore"]) for sample in samples]})


def _examined(name: str, data: bytes, mask: bytes | None, declared: Sequence[int], ignore: int | None) -> Any:
    try:
        return examine(name, data, mask, declared, ignore)
    except BadImage as error:
        return {"reason": error.reason, "detail": error.detail}
    except MemoryError:
        return {"reason": "too_large", "detail": "does not fit into memory"}
    except Exception as error:  # whatever a decoder raises is about this sample, and must not stop the others
        return {"reason": "damaged", "detail": f"{type(error).__name__}: {error}"[:200]}


def turns(each: Iterable[T], size_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """What is examined in one turn: at most TOGETHER, of TOGETHER_BYTES or one alone."""
    held: list[T] = []
    held_bytes = 0
    for one in each:
        size = size_bytes(one)
        if held and (held_bytes + size > TOGETHER_BYTES or len(held) >= TOGETHER):
            yield held
            held, held_bytes = [], 0
        held.append(one)
        held_bytes += size
    if held:
        yield held


def _read(answer: dict[str, Any]) -> Facts | BadImage:
    if "reason" not in answer:
        return cast("Facts", answer)
    reason = answer["reason"] if answer["reason"] in REASONS else "damaged"
    return BadImage(cast("Reason", reason), str(answer["detail"]))


def _reply(target: IO[bytes], answer: Any) -> None:
    target.write(json.dumps(answer).encode() + b"\n")
    target.flush()


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
