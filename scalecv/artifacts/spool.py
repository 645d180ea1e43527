"""The local, append-only file that carries everything a run tells, one JSON object per line.

The training writes, a `tracking.Sender` passes on, and the live display reads along. Nobody waits for
anybody: an append is one `write` to a local file (about 0.1 ms). Each event has a "kind":

    params, tags        {"params": {dotted key: value}} · {"tags": {name: text}}
    metrics             {"step": 20, "time_ms": …, "metrics": {"train/loss": 0.7}}
    artifact            {"uri": "s3://…/curve.png", "folder": "pictures"}
    image               {"uri": …, "key": "val/predictions", "step": 3}
    text                {"text": …, "file": "experiment.yaml"}
    dataset             {"name": …, "uri": …, "version": 3, "digest": …, "context": "train"}
    model               {"uri": bundle folder, "name": "model"}
    end                 {"status": "FINISHED" | "FAILED" | "KILLED"}
    progress            for the live display alone, never sent

It is also the door that no secret passes: every text is cleaned before it is written (see `scalecv.redact`).
"""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from scalecv import redact

Event = dict[str, Any]

READ_BYTES = 4 << 20


def append(path: str | Path, event: Event) -> None:
    """Add one event as one line, in one write, without secrets; a line that a crash tore is closed first.

    "time_ms" is set to now where the event has none.
    """
    cleaned = redact.clean_tree({"time_ms": int(time.time() * 1000), **event})
    line = json.dumps(cleaned, default=lambda value: redact.clean(str(value)), separators=(",", ":")) + "\n"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two writers never interleave; the kernel frees it when one dies
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        data = memoryview((b"\n" if torn else b"") + line.encode())
        while data:
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)


def read(path: str | Path, offset: int = 0, most_bytes: int = READ_BYTES) -> tuple[list[Event], int]:
    """Whole events from byte `offset` on, and the offset behind them.

    About `most_bytes` are read at once. A line still being written is left for the next call, a torn one
    is passed over; a missing file holds nothing, and a file shorter than `offset` is a new one, read from its start.
    """
    pairs, end = read_with_offsets(path, offset, most_bytes)
    return [event for event, _ in pairs], end


def read_with_offsets(
    path: str | Path, offset: int = 0, most_bytes: int = READ_BYTES
) -> tuple[list[tuple[Event, int]], int]:
    """As `read`, each event with the offset behind it."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return [], offset
    events: list[tuple[Event, int]] = []
    with file:
        if os.fstat(file.fileno()).st_size < offset:
            offset = 0
        file.seek(offset)
        for line in file.readlines(most_bytes):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            event = _parsed(line)
            if event is not None:
                events.append((event, offset))
    return events, offset


class Tail:
    """Reads on from where it stopped; for a live display."""

    def __init__(self, path: str | Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def new(self) -> list[Event]:
        """Events that came since the last call."""
        events, self.offset = read(self.path, self.offset)
        return events


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
