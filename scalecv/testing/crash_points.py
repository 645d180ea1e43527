"""Every point at which a process can die between two changes of storage, and what is left then.

    done = operations(publish)                      what `publish` changes, in order
    for point in points(done):                      before and after each; each local file torn at three cuts
        with dying_at(point), suppress(Crash):
            publish()

An object store's writes are whole or absent; a local file may be cut where power fails. The crash is an exception
that no handler of ours takes for an error, or the end of the process.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from scalecv import storage
from scalecv.storage_local import PART

Verdict = Literal["PASS", "HARD_FAIL", "SILENT", "LOST_WORK"]
"""As the quiet run; cannot go on; went on to another result; less was kept than was complete."""
CUTS = (0.0, 0.5, 1.0)
"""Share of a torn file that is there; at 1.0 only its last byte is missing."""


class Crash(BaseException):
    """The process dies here."""


@dataclass(frozen=True)
class Operation:
    """A change of storage."""

    number: int
    kind: str
    uri: str


@dataclass(frozen=True)
class Point:
    """Where to die."""

    operation: Operation
    moment: Literal["before", "after", "torn"]
    cut: float = 1.0

    def __str__(self) -> str:
        where = f"{self.moment} at {self.cut:g}" if self.moment == "torn" else self.moment
        return f"{where}, operation {self.operation.number}: {self.operation.kind} {self.operation.uri}"


def operations(call: Callable[[], object]) -> list[Operation]:
    """What a call changes on storage, in order; it runs to its end."""
    found: list[Operation] = []

    def note(moment: str, kind: str, uri: str) -> None:
        if moment == "before":
            found.append(Operation(len(found), kind, uri))

    with _observed(note):
        call()
    return found


def points(found: Iterable[Operation]) -> Iterator[Point]:
    """All places to die at some operations."""
    for operation in found:
        yield Point(operation, "before")
        yield Point(operation, "after")
        if operation.kind != "delete" and storage.is_local(operation.uri):
            for cut in CUTS:
                yield Point(operation, "torn", cut)


def crash() -> NoReturn:
    """Die by an exception."""
    raise Crash


def end_process() -> NoReturn:
    """Die as by SIGKILL: nothing is cleaned up."""
    sys.stdout.flush()
    os._exit(137)


@contextlib.contextmanager
def dying_at(point: Point, die: Callable[[], object] = crash) -> Iterator[list[Operation]]:
    """Die at a point of what runs inside; gives the operations that were complete until then.

    The point is found by its number alone: a call that is run again may write under other names.
    """
    complete: list[Operation] = []
    started = 0

    def watch(moment: str, kind: str, uri: str) -> None:
        nonlocal started
        number = started if moment == "before" else started - 1
        started += moment == "before"
        if number == point.operation.number:
            if point.moment == "torn" and moment == "after":
                _tear(storage.absolute(uri), point.cut)
                die()
            elif point.moment == moment:
                if moment == "after":
                    complete.append(Operation(number, kind, uri))
                die()
        if moment == "after":
            complete.append(Operation(number, kind, uri))

    with _observed(watch):
        yield complete


@contextlib.contextmanager
def _observed(watch: Callable[[str, str, str], None]) -> Iterator[None]:
    before = storage.observer
    storage.observer = watch
    try:
        yield
    finally:
        storage.observer = before


def _tear(path: str, cut: float) -> None:
    """Cut a file, and leave the temporary file of a writer that died beside it."""
    size = os.stat(path).st_size
    length = min(int(size * cut), max(0, size - 1))
    part = Path(path).with_name(f"{PART}torn")
    shutil.copy(path, part)
    for file in (Path(path), part):
        os.truncate(file, length)
