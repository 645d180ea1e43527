"""`scalecv tune`: trials of one experiment on Ray Tune, each a run of its own, paused at rungs and promoted.

    ledger ──▶ next_segment ──▶ Tune trial = segment of a run ──▶ record in the ledger

A Tune trial is one segment and ends by itself, so nothing is ever killed to stop a trial: its run saves and returns.
"""

import contextlib
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalecv import runtime, storage
from scalecv.artifacts import spool, tracking
from scalecv.config import Experiment, dump
from scalecv.errors import ConfigError, Interrupted, ScalecvError
from scalecv.search.ledger import Ledger
from scalecv.search.promotion import best_of, first_rung, next_segment
from scalecv.search.report import Swept, table
from scalecv.search.segment import run_segment
from scalecv.search.space import draw, resolve, told
from scalecv.search.trials import Point, Trial
from scalecv.shards.store import open_dataset
from scalecv.train import runs
from scalecv.train.checks import check, check_names, check_network
from scalecv.train.run import same_everywhere
from scalecv.train.signals import stop_on_signals

Event = dict[str, Any]
SAME_FAILURES = 3
"""First trials that all fail alike end the sweep: so would the others."""
DEATHS = 2
"""Processes of one segment that may die (a spot machine, a memory limit) before its trial counts as failed."""
TABLE_S = 30.0


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
    if not experiment.search.space:
        raise ConfigError(
            "search.space is empty: name keys and their values, as "
            "search: {space: {train.lr: {loguniform: [1e-4, 1e-2]}}}"
        )
    experiment = _alike(same_everywhere(experiment))
    manifest = open_dataset(experiment.data.uri, experiment.data.version).manifest

    def approve(one: Experiment) -> None:
        check(one, manifest)
        check_names(one)
        check_network(one, manifest)

    draw(experiment, 0, approve)  # a space that cannot work is told before anything is written
    storage.check_writable(runs.home(experiment))
    with runs.lease(experiment):
        ledger = Ledger(runs.home(experiment), experiment)
        ledger.wake()
        return _Sweep(experiment, ledger, approve, tell).run(code_dirs)


def _alike(experiment: Experiment) -> Experiment:
    """The experiment whose runs keep what is best by the objective; trials of one worker need no process beside theirs.

    Raises: ConfigError: the objective would be a loss.
    """
    from scalecv.tasks import TASKS

    metric = experiment.search.metric or experiment.train.metric or f"val/{TASKS[experiment.task].headline}"
    if metric.endswith("/loss"):
        raise ConfigError(
            f"train.metric={metric} depends on the weights that are searched: set search.metric, as val/iou"
        )
    train = experiment.train.model_copy(update={"metric": metric})
    workers = experiment.scale.workers if experiment.scale.workers > 1 else 0
    scale = experiment.scale.model_copy(update={"workers": workers, "min_workers": None})
    return experiment.model_copy(update={"train": train, "scale": scale})


class _Sweep:
    """A sweep under way: what Tune asks it, and what it is told."""

    def __init__(
        self,
        experiment: Experiment,
        ledger: Ledger,
        approve: Callable[[Experiment], None],
        tell: Callable[[Event], None],
    ) -> None:
        from scalecv.tasks.task import is_cost

        self.experiment, self.ledger, self.approve, self.tell = experiment, ledger, approve, tell
        self.metric = str(experiment.train.metric)
        self.sign = -1.0 if is_cost(self.metric) else 1.0
        self.under_way: dict[str, int] = {}
        self.failure = ""
        self.stopping = threading.Event()
        self.table_at = float("-inf")
        self.uri = tracking.tracking_uri(experiment.track.uri)
        trouble = tracking.probe(self.uri)
        self.patience_s = 5.0 if trouble else 60.0
        if trouble:
            self._say(f"{trouble}. The sweep goes on; its record waits in {ledger.home}")
        folder = Path(ledger.home) if storage.is_local(ledger.home) else runs.cache_folder() / ledger.key
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "spool.jsonl"
        about = (self.uri, experiment.track.experiment, experiment.name, ledger.key)
        self.sender = tracking.Sender(self.path, folder / "spool.sent.json", *about, {"scalecv.task": experiment.task})

    def run(self, code_dirs: tuple[str, ...]) -> Swept:
        """Run until nothing is left to do."""
        if not self.ledger.trials:
            space = {key: str(spec.model_dump(exclude_none=True)) for key, spec in self.experiment.search.space.items()}
            spool.append(self.path, {"kind": "params", "params": {f"search.space.{k}": v for k, v in space.items()}})
            spool.append(self.path, {"kind": "text", "file": "experiment.yaml", "text": dump(self.experiment)})
        status = "FAILED"
        try:
            if self._next() is not None:
                self._run_tune(code_dirs)
                self.ledger.wake()
                self._record()
            if self.failure:
                raise ScalecvError(self.failure)
            if self._next() is not None:
                status = "KILLED"
                raise Interrupted(
                    f"stopped as asked, all trials are kept in {self.ledger.home}: the same command goes on"
                )
            if all(one.status == "failed" for one in self.ledger.trials):
                raise ScalecvError(
                    f"all {len(self.ledger.trials)} trials failed, such as: {self.ledger.trials[-1].cause}"
                )
            status = "FINISHED"
            return self._swept()
        finally:
            spool.append(self.path, {"kind": "end", "status": status})
            if not self.sender.close(self.patience_s):
                self._say(self.sender.waiting())

    def suggest(self, tune_id: str) -> dict[str, Any] | str | None:
        """The next segment, for `ray_tune.run`."""
        from scalecv.search.ray_tune import FINISHED

        ends = self.failure or self.stopping.is_set()
        found = None if ends else self._next()
        if found is None:
            return None if self.under_way and not ends else FINISHED
        if isinstance(found, int):
            try:
                drawn = draw(self.experiment, found, self.approve)
            except ConfigError as error:
                self.failure = str(error)
                return FINISHED
            for reason in drawn.left_out:
                self._say(f"left out {reason}")
            found = Trial(
                found, drawn.overrides, until=first_rung(self.experiment.search, self.experiment.train.epochs)
            )
        trial = replace(found, status="running")
        self.ledger.keep(trial)
        self.under_way[tune_id] = trial.number
        return {"until": trial.until, "experiment": self._of(trial).model_dump(mode="json")}

    def ended(self, tune_id: str, result: dict[str, Any] | None) -> None:
        """Record what a segment told; nothing told means that its process died."""
        number = self.under_way.pop(tune_id, None)
        if number is None:
            return
        trial = self.ledger.trials[number]
        outcome = result or {"status": "failed", "cause": f"its process died {DEATHS + 1} times: out of memory?"}
        points = tuple(Point(**point) for point in outcome.pop("points", ())) or trial.points
        spent = trial.device_s + outcome.pop("device_s", 0.0)
        trial = replace(trial, points=points, device_s=spent, **outcome)
        self.ledger.keep(trial)
        now = f"{self.metric} {points[-1].value:.4f} after epoch {trial.epochs}" if points else "no epoch has ended yet"
        self._say(f"trial {number} {trial.status}: {told(trial.overrides)}: {trial.cause or now}")
        self._record(every_s=TABLE_S)
        failed = [one for one in self.ledger.trials if one.status == "failed"]
        ended = [one for one in self.ledger.trials if one.status != "running"]
        if len(failed) >= SAME_FAILURES and failed == ended and len({*map(self._kind, failed)}) == 1:
            self.failure = f"the first {len(failed)} trials all failed alike: {trial.cause}"

    def _kind(self, trial: Trial) -> str:
        """Why a trial failed, without what differs from trial to trial: its folder, numbers and ids."""
        return re.sub(r"[0-9a-f]{8,}|\d+", "#", trial.cause.replace(self._name(trial), ""))

    def _record(self, every_s: float = 0.0) -> None:
        """Tell MLflow how the sweep stands; the table, which grows with the trials, at most every so many seconds."""
        trials, epochs = self.ledger.trials, self.experiment.train.epochs
        best, spent = best_of(trials, epochs, self.sign), sum(one.device_s for one in trials)
        metrics = {"sweep/trials": float(len(trials)), "sweep/device_s": spent}
        if best is not None:
            metrics[f"best/{self.metric}"] = self.sign * best.value(epochs, self.sign)
        spool.append(self.path, {"kind": "metrics", "step": int(spent * 1000), "metrics": metrics})
        if time.monotonic() - self.table_at >= every_s:
            self.table_at = time.monotonic()
            spool.append(self.path, {"kind": "text", "file": "trials.md", "text": table(trials, self.metric)})

    def _next(self) -> Trial | int | None:
        return next_segment(self.ledger.trials, self.experiment.search, self.experiment.train.epochs, self.sign)

    def _of(self, trial: Trial) -> Experiment:
        made = resolve(self.experiment, trial.overrides)
        track = made.track.model_copy(update={"storage": storage.join(self.ledger.home, "runs")})
        return made.model_copy(update={"name": self._name(trial), "track": track})

    def _name(self, trial: Trial) -> str:
        return f"{self.experiment.name[:90]}-{trial.number:04d}"

    def _say(self, message: str) -> None:
        self.tell({"kind": "progress", "message": message})

    def _swept(self) -> Swept:
        """How it ended; trials that wait at a rung are stopped, unless a larger sweep promotes them."""
        trials = tuple(
            replace(one, status="stopped", cause=f"behind others after epoch {one.epochs}")
            if one.status == "paused"
            else one
            for one in self.ledger.trials
        )
        best = best_of(trials, self.experiment.train.epochs, self.sign)
        verdict = "no trial was trained to its end" if best is None else "not raced: one seed for each trial"
        about = (self.ledger.key, self.experiment.name, self.metric, trials, best, verdict)
        return Swept(*about, self.sender.run_id, storage.without_secrets(self.uri))

    def _run_tune(self, code_dirs: tuple[str, ...]) -> None:
        runtime.connect(code_dirs=code_dirs)
        from scalecv.search.ray_tune import run

        runs.check_shared(self.ledger.home, runtime.nodes())
        scale = self.experiment.scale
        cpus, gpus = runtime.resources()
        workers = max(1, scale.workers)
        use_gpu = scale.gpu == "yes" or (scale.gpu == "auto" and gpus >= workers)
        runtime.check_fits(workers, scale.cpus_per_worker, use_gpu)
        room = int(min(cpus // (workers * scale.cpus_per_worker), gpus // workers if use_gpu else cpus))
        most = min(room, self.experiment.search.concurrent or room)
        self._say(f"{len(self.ledger.trials)} of {self.experiment.search.trials} trials begun; {most} at a time")
        tags = {"scalecv.sweep": self.ledger.key, tracking.PARENT_KEY: self.ledger.key}
        # Of several workers Ray Train asks for the CPUs; beside them the trial itself may take none.
        alone = {"CPU": scale.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        resources = {"memory": 1.0} if scale.workers else alone
        with tempfile.TemporaryDirectory(prefix="scalecv-tune-") as folder:
            segment = _Segment(self.metric, tags, code_dirs)
            with stop_on_signals(self._stop, self.tell):
                run(self.suggest, self.ended, folder, segment, resources, most, DEATHS)

    def _stop(self) -> None:
        """Begin nothing more, and ask the runs under way to save and stop."""
        self.stopping.set()

        def ask() -> None:
            while self.under_way:  # again and again: a run that is about to begin takes away what lies there
                for number in list(self.under_way.values()):
                    with contextlib.suppress(OSError, ScalecvError):
                        if place := runs.newest(self._of(self.ledger.trials[number])):
                            storage.put(storage.join(place, "STOP"), b"stop")
                time.sleep(1.0)

        threading.Thread(target=ask, name="stop", daemon=True).start()


@dataclass(frozen=True)
class _Segment:
    """What Tune runs in a process of the cluster."""

    metric: str
    tags: dict[str, str]
    code_dirs: tuple[str, ...]

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        experiment = Experiment.model_validate(config["experiment"])
        return run_segment(experiment, self.metric, config["until"], self.tags, self.code_dirs)
