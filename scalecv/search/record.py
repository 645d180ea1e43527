"""What is told of a sweep: lines to whoever looks, its run in MLflow, pictures and a page beside the records."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalecv import redact, storage
from scalecv.artifacts import spool, tracking
from scalecv.config import Experiment, dump
from scalecv.search.ledger import Ledger
from scalecv.search.page import page
from scalecv.search.pictures import draw_all
from scalecv.search.report import Swept, Verdict, table
from scalecv.search.schedule import Plan, best_of, leader
from scalecv.search.space import told
from scalecv.train import runs

Event = dict[str, Any]
NUMBERS_S, TABLE_S = 1.0, 30.0
"""Seconds between two points and two tables of a sweep under way; they take the longer the more trials it has."""


class Record:
    """Of one sweep; MLflow may be away, what it is told waits in a spool."""

    def __init__(self, experiment: Experiment, ledger: Ledger, plan: Plan, tell: Callable[[Event], None]) -> None:
        """Begin to send what the spool holds."""
        self.experiment, self.ledger, self.plan, self.tell = experiment, ledger, plan, tell
        self.metric = str(experiment.train.metric)
        self.uri = tracking.tracking_uri(experiment.track.uri)
        trouble = tracking.probe(self.uri)
        self._patience_s = 5.0 if trouble else 60.0
        if trouble:
            self.say(f"{trouble}. The sweep goes on; its record waits in {ledger.home}")
        folder = Path(ledger.home) if storage.is_local(ledger.home) else runs.cache_folder() / ledger.key
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "spool.jsonl"
        self._numbers_at = self._table_at = float("-inf")
        about = (self.uri, experiment.track.experiment, experiment.name, ledger.key)
        self._sender = tracking.Sender(
            self._path, folder / "spool.sent.json", *about, {"scalecv.task": experiment.task}
        )
        if not ledger.trials:
            self._introduce()

    @property
    def run_id(self) -> str | None:
        """Of MLflow; None while it has not been reached."""
        return self._sender.run_id

    def say(self, message: str) -> None:
        """A line for whoever looks."""
        self.tell({"kind": "progress", "message": message})

    def stand(self, *, is_last: bool = False) -> None:
        """How the sweep stands: its numbers and its table, both not too often until it ends."""
        now, trials, plan = time.monotonic(), self.ledger.trials, self.plan
        if not is_last and now - self._numbers_at < NUMBERS_S:
            return
        self._numbers_at = now
        best, spent = best_of(plan, trials), self.ledger.device_s
        metrics = {"sweep/trials": float(len(trials)), "sweep/device_s": spent}
        if best is not None:
            metrics[f"best/{self.metric}"] = plan.sign * best.value(plan.sign)
        self._append({"kind": "metrics", "step": int(spent * 1000), "metrics": metrics})
        if not is_last and now - self._table_at < TABLE_S:
            return
        self._table_at = now
        ahead = leader(plan, trials)
        if ahead is not None:
            value = plan.sign * ahead.value(plan.sign)
            self._note(f"best so far: trial {ahead.number}, {self.metric} {value:.4f}: {told(ahead.overrides)}")
        self._append({"kind": "text", "file": "trials.md", "text": table(trials, self.metric)})

    def draw(self, found: Verdict | None = None) -> dict[str, bytes]:
        """Pictures by name, written below the sweep's folder; a fault in drawing is told, and costs no trial."""
        try:
            drawn = draw_all(self.plan, self.experiment, self.metric, list(self.ledger.trials), found)
            for name, data in drawn.items():
                storage.put(self._picture(name), data)
                self._append({"kind": "artifact", "uri": self._picture(name), "folder": "pictures"})
        except Exception as error:
            self.say(f"pictures of the sweep could not be made: {error!r}")
            return {}
        return drawn

    def report(self, swept: Swept) -> str:
        """The pictures, the page and the verdict. Returns: URI of the page."""
        drawn = self.draw(swept.verdict)
        for name in drawn:
            about = {"key": f"sweep/{name}", "step": int(swept.device_s * 1000)}
            self._append({"kind": "image", "uri": self._picture(name), **about})
        self._append({"kind": "text", "file": "verdict.txt", "text": swept.verdict.sentence + "\n"})
        self._note(swept.verdict.sentence)
        where = storage.join(self.ledger.home, "report.html")
        storage.put(where, redact.clean(page(swept, drawn, dump(self.experiment))).encode())
        self._append({"kind": "artifact", "uri": where, "folder": ""})
        return where

    def end(self, status: str) -> None:
        """Close the run in MLflow, send what trials could not, and say so if something still waits."""
        self._append({"kind": "end", "status": status})
        if not self._sender.close(self._patience_s):
            self.say(self._sender.waiting())
        elif storage.is_local(self.ledger.home):  # it is there now, and may have been away while a trial ended
            tracking.sync(self.ledger.home, self._patience_s, self.uri)

    def _introduce(self) -> None:
        space = {
            f"search.space.{key}": json.dumps(spec.model_dump(exclude_none=True, exclude_defaults=True))
            for key, spec in self.plan.search.space.items()
        }
        # As tags: parameters would stand over each picture in MLflow's pages.
        self._append({"kind": "tags", "tags": space})
        self._append({"kind": "text", "file": "experiment.yaml", "text": dump(self.experiment)})

    def _note(self, text: str) -> None:
        """What the sweep's page in MLflow says first."""
        asked = f"{self.experiment.question}\n\n" if self.experiment.question else ""
        self._append({"kind": "tags", "tags": {"mlflow.note.content": asked + text}})

    def _picture(self, name: str) -> str:
        return storage.join(self.ledger.home, "pictures", f"{name}.png")

    def _append(self, event: Event) -> None:
        spool.append(self._path, event)
