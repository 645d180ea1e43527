"""What MLflow has acknowledged of a spool, kept beside it, so that each point is sent once."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scalecv.artifacts import mlflow_run, spool

log = logging.getLogger("scalecv.tracking")

STATE_SUFFIX = ".sent.json"
RETRY_FILES_S = 30.0
TOLD = ("uri", "experiment", "run_name", "run_key", "tags", "run_id")


class Sent:
    """What MLflow has acknowledged of one spool; kept in a file, replaced whole."""

    def __init__(self, path: str, uri: str, run_key: str) -> None:
        """Read what an earlier process left at `path` for the same tracking URI (without secrets) and run."""
        self.path = path
        self.uri = uri
        self.run_key = run_key
        self.run_id: str | None = None
        self.forget()
        self._tried = 0.0
        self.load()

    def forget(self) -> None:
        """Start from the beginning of the spool, for a run that knows nothing yet."""
        self.run_id = None
        self.offset = 0
        self.marks: dict[str, int] = {}
        """Step of each metric's newest point that was sent from here."""
        self.there: dict[str, set[int]] = {}
        """Steps that the server has beyond the marks: of this run on another machine, or answers that were lost."""
        self.pictures: dict[str, int] = {}
        self.deferred: list[spool.Event] = []

    def load(self) -> None:
        """Take what an earlier process left for the same server and run; damaged or foreign files count as none."""
        try:
            kept = json.loads(Path(self.path).read_text(encoding="utf-8"))
            if kept["uri"] != self.uri or kept["run_key"] != self.run_key or not kept["run_id"]:
                self.forget()
                return
            self.run_id, self.offset, self.deferred = kept["run_id"], kept["offset"], kept["deferred"]
            self.marks = {key: _step(mark) for key, mark in kept["marks"].items()}
            self.pictures = kept["pictures"]
        except (OSError, ValueError, KeyError, TypeError):
            self.forget()

    def save(self, about: Mapping[str, Any]) -> None:
        """Write the state, whole or not at all."""
        kept = {
            **about,
            "run_id": self.run_id,
            "offset": self.offset,
            "marks": self.marks,
            "pictures": self.pictures,
            "deferred": self.deferred,
        }
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        part = f"{self.path}.{os.getpid()}.part"
        with open(part, "w", encoding="utf-8") as file:
            json.dump(kept, file)
        os.replace(part, self.path)

    def fresh(self, event: spool.Event) -> list[mlflow_run.Point]:
        """Points of a metrics event, one for each (key, step): what a restarted training repeats is passed over."""
        step, time_ms = int(event.get("step", 0)), int(event["time_ms"])
        points = []
        for name, value in event.get("metrics", {}).items():
            if isinstance(value, bool | int | float):
                key = mlflow_run.metric_key(name)
                if step > self.marks.get(key, -1):
                    if step not in self.there.get(key, ()):
                        points.append(mlflow_run.Point(key, step, float(value), time_ms))
                    self.marks[key] = step
        return points

    def first_picture(self, event: spool.Event) -> bool:
        """Whether no picture of this key and step came before; remembers it."""
        key, step = str(event.get("key")), int(event.get("step", 0))
        if self.pictures.get(key, -1) >= step:
            return False
        self.pictures[key] = step
        return True

    def is_time(self, now: bool) -> bool:
        """Whether to try deferred files again: each half minute, or now."""
        if now or time.monotonic() - self._tried > RETRY_FILES_S:
            self._tried = time.monotonic()
            return True
        return False


def _step(mark: Any) -> int:
    """Earlier versions kept the value beside the step."""
    return int(mark[0] if isinstance(mark, list) else mark)


def waiting_in(path: str, offset: int) -> tuple[int, int]:
    """Points and other entries in a spool behind an offset."""
    points = others = 0
    while True:
        events, offset = spool.read(path, offset)
        if not events:
            return points, others
        for event in events:
            if event.get("kind") == "metrics":
                points += len(event.get("metrics", {}))
            elif event.get("kind") != "progress":
                others += 1


def unsent(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any], int]]:
    """States below a folder behind which something waits: file, content, and how many points and other entries wait."""
    for path in sorted(Path(folder).rglob(f"*{STATE_SUFFIX}")):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            count = sum(waiting_in(kept["spool"], kept["offset"])) + len(kept["deferred"])
            kept = {"spool": kept["spool"], **{name: kept[name] for name in TOLD}}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not a sender's state (%s): left alone", path, error)
            continue
        if count:
            yield path, kept, count
