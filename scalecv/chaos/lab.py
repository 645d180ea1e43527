"""Where a recipe is run again and again: a folder of its own, one MLflow store, and the same command for each fault."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalecv.chaos.verdict import Run
from scalecv.config import Experiment
from scalecv.errors import ScalecvError
from scalecv.testing.train_process import TrainProcess, updates_of

Step = tuple[int, int]
"""Number of updates, and when the step was done, ms."""
STARTS = 3
"""How often the same command is given before a run counts as lost."""


@dataclass
class Lab:
    """The recipe, and what is needed to run it."""

    command: list[str]
    """The experiment file and the user's own overrides."""
    experiment: Experiment
    """The same, resolved."""
    steps: int
    """Updates of the whole run."""
    folder: Path
    limit_s: float = 3600.0
    """Seconds that one start may take."""
    forced: dict[str, Any] = field(default_factory=dict)
    """Keys that are set for all runs."""

    @property
    def store(self) -> str:
        """The MLflow store of all runs that need no other."""
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def run_folder(self, name: str) -> Path:
        """Where a run lies that is stored in the lab."""
        return self.folder / "runs" / f"{self.experiment.name}-{name}" / "001"

    def process(
        self, name: str, keys: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
    ) -> TrainProcess:
        """The train command under a name of its own, not yet started."""
        own = {"name": f"{self.experiment.name}-{name}", "track.storage": str(self.folder / "runs")}
        own |= {"track.uri": self.store, **self.forced, **(keys or {})}
        folder = self.folder / "logs" / name
        remote = "://" in str(own["track.storage"])
        where = (folder / "cache", "scalecv/runs/*/spool.jsonl") if remote else (
            Path(str(own["track.storage"])) / str(own["name"]), "*/spool.jsonl"
        )  # fmt: skip
        arguments = [*self.command, *(f"{key}={value}" for key, value in own.items())]
        quiet = {"RAY_ADDRESS": "", "MLFLOW_TRACKING_URI": ""}
        return TrainProcess(arguments, {**quiet, **(environment or {})}, folder, where)

    def finish(self, process: TrainProcess, before: Iterable[Step] = (), began: float | None = None) -> Run:
        """Let a run end, with the same command again where it has to be; what it came to.

        Args:
            process: started, or ended by a fault.
            before: steps that earlier starts did.
            began: `time.monotonic` when the run began.
        """
        done, began = list(before), began or time.monotonic()
        for start in range(1, STARTS + 1):
            if process.running.poll() is not None and start > 1:
                process.start()
            process.wait(self.limit_s)
            done += steps_of(process)
            if process.code == 0:
                break
        result = process.result() if process.code == 0 else {}
        return Run(
            process.code,
            process.said(),
            str(result.get("weights_hash", "")),
            str(result.get("order_hash", "")),
            tuple(step for step, _ in dict.fromkeys(done)),
            time.monotonic() - began,
        )

    def record_of(self, name: str, uri: str | None = None) -> str:
        """What is wrong with the record of a run in MLflow; empty where it has one run with each step once."""
        from scalecv.artifacts.mlflow_client import client

        asked = client(uri or self.store)
        found = asked.get_experiment_by_name(self.experiment.track.experiment)
        wanted = f"{self.experiment.name}-{name}"
        runs = asked.search_runs([found.experiment_id], f"tags.mlflow.runName = '{wanted}'") if found else []
        if len(runs) != 1:
            return f"MLflow has {len(runs)} runs named {wanted}, expected 1"
        if runs[0].info.status != "FINISHED":
            return f"MLflow says that the run is {runs[0].info.status}"
        steps = [point.step for point in asked.get_metric_history(runs[0].info.run_id, "train/batch_loss")]
        lost, double = self.steps - len(set(steps)), len(steps) - len(set(steps))
        return f"MLflow lacks {lost} points of {self.steps} and has {double} twice" if lost or double else ""


def steps_of(process: TrainProcess) -> list[Step]:
    """The steps that a start of a run has told so far; one told again after a restart has its first time."""
    return [(updates, event["time_ms"]) for event in process.events if (updates := updates_of(event))]


def newest_checkpoint(run: str) -> int:
    """Updates of the newest complete checkpoint of a run; 0 where there is none."""
    from scalecv.train import checkpoint

    found, _ = checkpoint.complete(run)
    return found[0].updates if found else 0


class NotHere(ScalecvError):
    """This machine or recipe cannot show a fault."""
