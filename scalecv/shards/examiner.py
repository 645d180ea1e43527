"""Examination in a process of its own, whose death is itself a reason to set a sample aside.

The two ends talk over pipes: one JSON line, then the bytes it announces; one JSON line back. Samples
go one by one, so a death or a time-out is always that sample's own.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from scalecv.shards.decode import REASONS, BadImage, Reason
from scalecv.shards.examine import Facts, examine

TIMEOUT_S = 60.0
START_S = 120.0


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
        child = self._started()
        sizes = {"image": len(data), "mask": None if mask is None else len(mask)}
        head = json.dumps({"name": name, "declared": list(declared), "ignore": ignore, **sizes})
        try:
            stdin = cast("IO[bytes]", child.stdin)
            stdin.write(head.encode() + b"\n" + data + (mask or b""))
            stdin.flush()
            answer = self._answer(child, self._timeout_s)
        except (BrokenPipeError, EOFError):
            code = self._stop()
            raise BadImage("decoder_died", f"the decoder ended with {_ending(code)}") from None
        except TimeoutError:
            self._stop()
            raise BadImage("timeout", f"not decoded after {self._timeout_s:g} s") from None
        if "reason" in answer:
            reason = answer["reason"] if answer["reason"] in REASONS else "damaged"
            raise BadImage(cast("Reason", reason), str(answer["detail"]))
        return cast("Facts", answer)

    def close(self) -> None:
        """End the child."""
        self._stop()

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
                | {"PYTHONPATH": os.pathsep.join([where, *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"},
            )
            self._answer(self._child, START_S)
        return self._child

    def _answer(self, child: "subprocess.Popen[bytes]", timeout_s: float) -> dict[str, Any]:
        stdout = cast("IO[bytes]", child.stdout)
        until, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError
            line += part
        return cast("dict[str, Any]", json.loads(line))

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
        data = source.read(head["image"])
        mask = None if head["mask"] is None else source.read(head["mask"])
        try:
            answer: Any = examine(head["name"], data, mask, head["declared"], head["ignore"])
        except BadImage as error:
            answer = {"reason": error.reason, "detail": error.detail}
        except MemoryError:
            answer = {"reason": "too_large", "detail": "does not fit into memory"}
        except Exception as error:  # whatever a decoder raises is about this sample, and must not stop the others
            answer = {"reason": "damaged", "detail": f"{type(error).__name__}: {error}"[:200]}
        _reply(target, answer)


def _reply(target: IO[bytes], answer: Any) -> None:
    target.write(json.dumps(answer).encode() + b"\n")
    target.flush()


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
