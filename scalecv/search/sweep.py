"""`scalecv tune`: trials of one experiment on Ray Tune, each a run of its own, paused at rungs and promoted.

    ledger ──▶ next_segment ──▶ Tune trial = segment of a run ──▶ record in the ledger

A Tune trial is one segment and ends by itself, so nothing is ever killed to stop a trial: its run saves and returns.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scalecv import runtime, storage
from scalecv.artifacts import spool, tracking
from scalecv.config import Experiment, dump
from scalecv.errors import ConfigError, Interrupted, ScalecvError
from scalecv.search.ledger import Ledger
from scalecv.search.promotion import best_of, first_rung, next_segment
from scalecv.search.segment import run_segment
from scalecv.search.space import draw, resolve, told
from scalecv.search.trials import Point, Trial
from scalecv.shards.store import open_dataset
from scalecv.train import runs
from scalecv.train.checks import check
from scalecv.train.run import same_everywhere

Event = dict[str, Any]
SAME_FAILURES = 3
"""First trials that all fail with the same message end the sweep: so would the others."""


@dataclass(frozen=True)
class Swept:
    """How a sweep stands."""

    sweep_id: str
    name: str
    metric: str
    trials: tuple[Trial, ...]
    best: Trial | None
    verdict: str
    run_id: str | None
    tracking_uri: str


def tune(
    experiment: Experiment, *, code_dirs: tuple[str, ...] = (), tell: Callable[[Event], None] = lambda _: None
) -> Swept:
    """Search the space of an experiment, going on where an earlier command of the same name stopped.

    Args:
        experiment: with `search.space`.
        code_dirs: folders whose modules the trials must find.
        tell: called with each event, for a live display.
    Raises: UserError: wrong input, nothing was started. Interrupted: stopped on request, the same command goes on.
        ScalecvError: the sweep failed.
    """
    search = experiment.search
    if not search.space:
        raise ConfigError(
            "search.space is empty: name keys and their values, as "
            "search: {space: {train.lr: {loguniform: [1e-4, 1e-2]}}}"
        )
    from scalecv.tasks import TASKS

    experiment = same_everywhere(experiment)
    manifest = open_dataset(experiment.data.uri, experiment.data.version).manifest
    metric = search.metric or experiment.train.metric or f"val/{TASKS[experiment.task].headline}"
    home = runs.home(experiment)
    storage.check_writable(home)
    with runs.lease(experiment):
        ledger = Ledger(home, experiment)
        ledger.wake()
        sweep = _Sweep(experiment, metric, ledger, manifest, tell)
        return sweep.run(code_dirs)


class _Sweep:
    """A sweep under way: what Tune asks it, and what it is told."""

    def __init__(
        self, experiment: Experiment, metric: str, ledger: Ledger, manifest: Any, tell: Callable[[Event], None]
    ) -> None:
        self.experiment, self.search, self.metric, self.ledger = experiment, experiment.search, metric, ledger
        self.manifest, self.tell = manifest, tell
        from scalecv.tasks.task import is_cost

        self.sign = -1.0 if is_cost(metric) else 1.0
        self.under_way: dict[str, int] = {}
        self.failure = ""
        self.uri = tracking.tracking_uri(experiment.track.uri)
        local = storage.is_local(ledger.home)
        folder = Path(ledger.home) if local else runs.cache_folder() / ledger.key
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "spool.jsonl"
        about = (self.uri, experiment.track.experiment, experiment.name, ledger.key)
        self.sender = tracking.Sender(self.path, folder / "spool.sent.json", *about, {"scalecv.task": experiment.task})

    def run(self, code_dirs: tuple[str, ...]) -> Swept:
        """Run until nothing is left to do."""
        if not self.ledger.trials:
            params = {key: str(spec.model_dump(exclude_none=True)) for key, spec in self.search.space.items()}
            spool.append(self.path, {"kind": "params", "params": {f"search.space.{k}": v for k, v in params.items()}})
            spool.append(self.path, {"kind": "text", "file": "experiment.yaml", "text": dump(self.experiment)})
        status = "FAILED"
        try:
            if self._peek():
                self._run_tune(code_dirs)
                self.ledger.wake()
            if self.failure:
                raise ScalecvError(self.failure)
            if self._peek():
                status = "KILLED"
                raise Interrupted(
                    f"stopped as asked, all trials are kept in {self.ledger.home}: the same command goes on"
                )
            status = "FINISHED"
            for trial in self.ledger.trials:
                if trial.status == "paused":
                    self._keep(replace(trial, status="stopped", cause=f"behind others after epoch {trial.epochs}"))
            return self._swept()
        finally:
            spool.append(self.path, {"kind": "end", "status": status})
            if not self.sender.close(30.0):
                self._say(self.sender.waiting())

    def suggest(self, tune_id: str) -> dict[str, Any] | str | None:
        """The next segment as what Tune gives to `run_segment`; None: not now; "finished": nothing is left."""
        found = None if self.failure else self._next()
        if found is None:
            return None if self.under_way and not self.failure else "finished"
        if isinstance(found, int):
            drawn = draw(self.experiment, found, self._approve)
            for reason in drawn.left_out:
                self._say(f"left out {reason}")
            found = Trial(found, drawn.overrides, until=first_rung(self.search, self.experiment.train.epochs))
        trial = replace(found, status="running")
        self.ledger.keep(trial)
        self.under_way[tune_id] = trial.number
        return {"number": trial.number, "until": trial.until, "experiment": self._of(trial).model_dump(mode="json")}

    def ended(self, tune_id: str, result: dict[str, Any] | None) -> None:
        """Record what a segment told; nothing told means that its process died."""
        number = self.under_way.pop(tune_id, None)
        if number is None:
            return
        trial = self.ledger.trials[number]
        outcome = result or {"status": "failed", "cause": "its process ended without a word"}
        points = {point.epoch: point for point in trial.points}
        points |= {point["epoch"]: Point(**point) for point in outcome.pop("points", ())}
        spent = trial.device_s + outcome.pop("device_s", 0.0)
        known = tuple(points[epoch] for epoch in sorted(points))
        self._keep(replace(trial, points=known, device_s=spent, **outcome))
        failed = [one.cause for one in self.ledger.trials if one.status == "failed"]
        if len(failed) >= SAME_FAILURES and len(failed) == len(self.ledger.trials) and len({*failed}) == 1:
            self.failure = f"the first {len(failed)} trials all failed: {failed[0]}"

    def _keep(self, trial: Trial) -> None:
        self.ledger.keep(trial)
        value = trial.points[-1].value if trial.points else float("nan")
        now = f"{self.metric} {value:.4f} after epoch {trial.epochs}" if trial.points else trial.cause
        self._say(f"trial {trial.number} {trial.status}: {told(trial.overrides)}: {now}")
        best = best_of(self.ledger.trials, self.experiment.train.epochs, self.sign)
        spent = sum(one.device_s for one in self.ledger.trials)
        metrics = {"sweep/trials": float(len(self.ledger.trials)), "sweep/device_s": spent}
        if best is not None:
            metrics[f"best/{self.metric}"] = self.sign * best.value(self.experiment.train.epochs, self.sign)
        spool.append(self.path, {"kind": "metrics", "step": int(spent * 1000), "metrics": metrics})
        spool.append(self.path, {"kind": "text", "file": "trials.md", "text": table(self.ledger.trials, self.metric)})

    def _peek(self) -> bool:
        return self._next() is not None

    def _next(self) -> Trial | int | None:
        return next_segment(self.ledger.trials, self.search, self.experiment.train.epochs, self.sign)

    def _of(self, trial: Trial) -> Experiment:
        made = resolve(self.experiment, trial.overrides)
        track = made.track.model_copy(update={"storage": storage.join(self.ledger.home, "runs")})
        train = made.train.model_copy(update={"metric": made.train.metric or self.metric})
        return made.model_copy(update={"name": f"{made.name[:90]}-{trial.number:04d}", "track": track, "train": train})

    def _approve(self, experiment: Experiment) -> None:
        check(experiment, self.manifest)

    def _say(self, message: str) -> None:
        self.tell({"kind": "progress", "message": message})

    def _swept(self) -> Swept:
        best = best_of(self.ledger.trials, self.experiment.train.epochs, self.sign)
        verdict = "no trial finished" if best is None else "not raced: one seed for each trial"
        where = storage.without_secrets(self.uri)
        trials = tuple(self.ledger.trials)
        return Swept(
            self.ledger.key, self.experiment.name, self.metric, trials, best, verdict, self.sender.run_id, where
        )

    def _run_tune(self, code_dirs: tuple[str, ...]) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        runtime.connect(code_dirs=code_dirs)
        from scalecv.search.ray_tune import run

        self._say(f"{len(self.ledger.trials)} of {self.search.trials} trials begun; Ray Tune starts")
        parent = self.sender.run_id
        tags = {"scalecv.sweep": self.ledger.key, **({"mlflow.parentRunId": parent} if parent else {})}
        scale = self.experiment.scale
        cpus = scale.cpus_per_worker if scale.workers == 0 else 0.01
        with tempfile.TemporaryDirectory(prefix="scalecv-tune-") as folder:
            run(self.suggest, self.ended, folder, _Segment(self.metric, tags, code_dirs), cpus, self.search.concurrent)


@dataclass(frozen=True)
class _Segment:
    """What Tune runs in a process of the cluster."""

    metric: str
    tags: dict[str, str]
    code_dirs: tuple[str, ...]

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        experiment = Experiment.model_validate(config["experiment"])
        return run_segment(experiment, self.metric, config["until"], self.tags, self.code_dirs)


QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"}


def table(trials: list[Trial], metric: str) -> str:
    """The trials as a Markdown table."""
    lines = [f"| trial | status | epochs | {metric} | device-s | values |", "|---|---|---|---|---|---|"]
    for one in trials:
        value = f"{one.points[-1].value:.4f}" if one.points else ""
        what = told(one.overrides) + (f" ({one.cause})" if one.cause else "")
        lines.append(f"| {one.number} | {one.status} | {one.epochs} | {value} | {one.device_s:.0f} | {what} |")
    return "\n".join(lines) + "\n"


def as_json(swept: Swept) -> dict[str, Any]:
    """What `--json` prints."""
    keys = ("number", "run_id", "status", "metrics", "overrides", "device_s", "cause", "weights_hash", "bundle")
    trials = [{key: getattr(one, key) for key in keys} for one in swept.trials]
    best = None if swept.best is None else trials[swept.best.number]
    return {**asdict(swept), "trials": trials, "best": best}
