"""The one door to MLflow: a sender passes the spool of a run on, whatever MLflow is doing.

The training never waits for it. MLflow away means that points stay in the spool; they are sent when it is back,
by this process, by the same command later, or by `scalecv sync`. Each point arrives exactly once, whatever dies when:

- the run is looked up by the tag `scalecv.run_key` before it is created, so a lost answer makes no second run;
- the acknowledged offset is written to `state_path` after each answer, and what is sent again because an answer
  was lost, or because this process died between the answer and the note of it, has the same (key, step, timestamp,
  value), which is the primary key of MLflow's SQL store: it looks for the rows that are there and adds the others;
- steps that a restarted training repeats have another timestamp: they are passed over by (key, step).
"""

import contextlib
import logging
import os
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalecv import redact, storage
from scalecv.artifacts import mlflow_run, spool
from scalecv.artifacts.lookup import is_reference as is_reference
from scalecv.artifacts.lookup import lookup as lookup
from scalecv.artifacts.lookup import resolved_experiment as resolved_experiment
from scalecv.artifacts.mlflow_client import probe as probe
from scalecv.artifacts.mlflow_client import tracking_uri as tracking_uri
from scalecv.artifacts.mlflow_run import PARENT_KEY as PARENT_KEY
from scalecv.artifacts.provenance import run_facts as run_facts
from scalecv.artifacts.provenance import working_diff as working_diff
from scalecv.artifacts.sent import Sent, unsent, waiting_in

log = logging.getLogger("scalecv.tracking")

PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
FILES = ("artifact", "image", "text", "model")


class Sender:
    """A daemon thread that tells MLflow what stands in one spool; nothing of it reaches the caller as an error."""

    def __init__(
        self,
        spool_path: str | Path,
        state_path: str | Path,
        uri: str,
        experiment: str,
        run_name: str,
        run_key: str,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Start sending.

        Args:
            spool_path: the run's spool, which need not exist yet.
            state_path: what was acknowledged, a file whose name ends in ".sent.json" so that `sync` finds it.
            uri: tracking URI, as `tracking_uri` gives it.
            experiment: name of the MLflow experiment, created if absent.
            run_name: name of the run in the UI.
            run_key: the run's identity; the same key is the same MLflow run.
            tags: tags of the run, such as "mlflow.parentRunId".
        """
        self.spool_path = os.path.abspath(spool_path)
        self.state_path = os.path.abspath(state_path)
        self.uri = uri
        self._about = redact.clean_tree({"experiment": experiment, "run_name": run_name, "run_key": run_key})
        self._tags: dict[str, str] = redact.clean_tree(tags or {})
        self._state = Sent(self.state_path, storage.without_secrets(uri), run_key)
        self._run: mlflow_run.Run | None = None
        self._reopened = False
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._closing = threading.Event()
        self._sent = threading.Event()
        self._said = ""
        self._lock: Any = None
        if not os.path.exists(self.state_path):
            with contextlib.suppress(OSError):  # a full disk is told by the thread, not to the caller
                self._save()
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None while MLflow has not answered yet."""
        return self._run.run_id if self._run else self._state.run_id

    def close(self, timeout_s: float = 30.0) -> bool:
        """Wait until all is sent; False when that takes longer than `timeout_s` (`waiting` tells what is left)."""
        self._closing.set()
        self._wake.set()
        done = self._sent.wait(timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=1.0)
        return done

    def waiting(self) -> str:
        """One line for the user: how much waits, where, why, and what sends it."""
        points, others = waiting_in(self.spool_path, self._state.offset)
        others += len(self._state.deferred)
        return (
            f"{points} points and {others} other entries wait in {self.spool_path} for MLflow at "
            f"{storage.without_secrets(self.uri)}{f' ({self._said})' if self._said else ''}: "
            "the same command sends them later, and so does `scalecv sync`"
        )

    def _work(self) -> None:
        pause_s = PAUSE_S
        while not self._stop.is_set():
            last_round, before = self._closing.is_set(), self._state.offset
            try:
                if self._locked():
                    done = self._send_all()
                    pause_s, self._said = PAUSE_S, self._said if self._state.deferred else ""
                    if done and last_round:
                        self._sent.set()
                        break
            except mlflow_run.Gone:
                log.warning("the MLflow run %s is gone: sending everything to a new one", self.run_id)
                self._run, self._reopened = None, False
                self._state.forget()
            except Exception as error:
                self._complain(f"MLflow takes nothing now; the run goes on and points wait in {self.spool_path}", error)
                self._state.load()  # what was read but not acknowledged is read again
                if self._state.run_id is None:
                    self._run = None  # the notes are gone: what the server has is asked for again
                moved = self._state.offset > before
                pause_s = PAUSE_S if moved else min(pause_s * 2, 2.0 if self._closing.is_set() else LONGEST_PAUSE_S)
            self._wake.wait(pause_s * (0.5 + random.random()))  # noqa: S311 - many runs wait for one server
            if self._wake.is_set() and not self._stop.is_set():
                self._wake.clear()
        self._unlock()

    def _complain(self, what: str, error: Exception) -> None:
        said = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        said = redact.clean(said)
        if not self._said:
            log.warning("%s (%s)", what, said)
        self._said = said

    def _send_all(self) -> bool:
        """Send what is there; True when nothing was left."""
        run = self._open()
        points: list[mlflow_run.Point] = []
        while not self._stop.is_set():
            begin = self._state.offset
            events, end = spool.read_with_offsets(self.spool_path, begin)
            for event, offset in events:
                kind = event.get("kind")
                if kind == "metrics":
                    points += self._state.fresh(event)
                    if len(points) >= mlflow_run.MOST_METRICS:
                        self._send_points(run, points, offset)
                        points = []
                elif kind != "progress":
                    self._send_points(run, points, None)
                    points = []
                    if kind == "end":
                        self._reopened = False
                    else:
                        self._reopen(run)
                    if kind != "image" or self._state.first_picture(event):
                        self._send_event(run, event)
                    self._acknowledge(offset)
                if self._stop.is_set():
                    return False
            self._send_points(run, points, None)
            points = []
            if end == begin:
                break
            self._acknowledge(end)
        return self._send_deferred(run)

    def _open(self) -> mlflow_run.Run:
        if self._run is None:
            first, _ = spool.read(self.spool_path, 0, 1)
            start_ms = first[0].get("time_ms") if first else None
            run = mlflow_run.open_run(
                self.uri,
                self._about["experiment"],
                self._about["run_name"],
                self._about["run_key"],
                self._tags,
                start_ms,
            )
            newest = mlflow_run.newest(run)
            if self._state.run_id != run.run_id:
                self._state.forget()
                self._state.run_id = run.run_id
            marks = self._state.marks
            news = [key for key, step in newest.items() if step > marks.get(key, -1)]
            self._state.there = {key: mlflow_run.steps(run, key) for key in news}
            self._run = run
            self._save()
        return self._run

    def _send_points(self, run: mlflow_run.Run, points: list[mlflow_run.Point], offset: int | None) -> None:
        if points:
            self._reopen(run)
        for at in range(0, len(points), mlflow_run.MOST_METRICS):
            _log_or_halve(run, points[at : at + mlflow_run.MOST_METRICS])
        if offset is not None:
            self._acknowledge(offset)

    def _send_event(self, run: mlflow_run.Run, event: spool.Event) -> None:
        try:
            mlflow_run.log_event(run, event)
        except mlflow_run.Refused as error:
            log.warning("left out of the MLflow run %s: %s (%s)", run.run_id, event.get("kind"), error)
        except mlflow_run.Gone:
            raise
        except Exception as error:
            if event.get("kind") not in FILES:
                raise
            mlflow_run.newest(run)  # raises when the server is away; else only its artifact store fails
            self._state.deferred.append(event)
            self._complain(f"MLflow did not take {event.get('uri') or event.get('file')}, it is tried again", error)

    def _send_deferred(self, run: mlflow_run.Run) -> bool:
        """Try files again that the artifact store did not take; True when none is left."""
        if not self._state.deferred or not self._state.is_time(self._closing.is_set()):
            return not self._state.deferred
        waiting, self._state.deferred = self._state.deferred, []
        for event in waiting:
            self._send_event(run, event)
        self._save()
        return not self._state.deferred

    def _reopen(self, run: mlflow_run.Run) -> None:
        if not self._reopened:
            mlflow_run.reopen(run)
            self._reopened = True

    def _acknowledge(self, offset: int) -> None:
        self._state.offset = offset
        self._save()

    def _save(self) -> None:
        about = {**self._about, "uri": self._state.uri, "spool": self.spool_path, "tags": self._tags}
        self._state.save(about)

    def _locked(self) -> bool:
        """Whether this process is the one that sends this spool; tried again each round."""
        if self._lock is None:
            from filelock import FileLock, Timeout

            lock = FileLock(f"{self.state_path}.lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._said = "another process is sending it"
                return False
            self._lock = lock
            self._state.load()
        return True

    def _unlock(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()
            self._lock = None


def sync(folder: str | Path, timeout_s: float = 60.0, uri: str | None = None) -> tuple[int, int]:
    """Send what waits below a folder; the number of spools that are sent now, and of those that still wait.

    Args:
        folder: where to look for files that end in ".sent.json".
        timeout_s: time for each of them.
        uri: tracking URI; None takes the one in use, and SQLite stores that runs name. What waits for another server
            stays: a file in a folder does not decide who is shown the user's token.
    """
    known, done, waiting = tracking_uri(uri), 0, 0
    for path, kept, _ in unsent(folder):
        meant = known if uri or storage.without_secrets(known) == kept["uri"] else kept["uri"]
        if meant != known and not meant.startswith("sqlite:"):
            log.warning("%s waits for MLflow at %s: say --uri %s to send it there", path, meant, meant)
            waiting += 1
            continue
        about = (kept["experiment"], kept["run_name"], kept["run_key"], kept["tags"])
        sender = Sender(kept["spool"], path, meant, *about)
        if sender.close(timeout_s):
            done += 1
        else:
            waiting += 1
            log.warning(sender.waiting())
    return done, waiting


def _log_or_halve(run: mlflow_run.Run, points: list[mlflow_run.Point]) -> None:
    """Send points; of a batch that MLflow refuses, leave out only those it refuses alone."""
    try:
        mlflow_run.log_points(run, points)
    except mlflow_run.Refused as error:
        if len(points) == 1:
            log.warning("left out of the MLflow run %s: %s (%s)", run.run_id, points[0], error)
            return
        half = len(points) // 2
        _log_or_halve(run, points[:half])
        _log_or_halve(run, points[half:])
