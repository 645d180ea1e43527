"""`scalecv tune`: trials of one experiment on Ray Tune, each a run of its own, paused at rungs and promoted.

    ledger ──▶ next_segment ──▶ Tune trial = segment of a run ──▶ record in the ledger

A Tune trial is one segment and ends by itself, so nothing is ever killed to stop a trial: its run saves and returns.
"""

import contextlib
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from scalecv import runtime, storage
from scalecv.artifacts import tracking
from scalecv.config import Experiment, flatten
from scalecv.errors import ConfigError, Interrupted, ScalecvError, UserError
from scalecv.search.approval import approval
from scalecv.search.decide import next_training, search_left_s
from scalecv.search.failures import hopeless
from scalecv.search.ledger import Ledger, is_begun
from scalecv.search.prepare import prepared
from scalecv.search.race import Standing, standing_of
from scalecv.search.record import Record
from scalecv.search.report import Swept, best_trial, entrant_name, verdict
from scalecv.search.schedule import ERROR, Plan, best_of, leader, least_budget_s
from scalecv.search.searchers import check_living, perturbed, runnable, values_of, written_keys
from scalecv.search.segment import run_segment
from scalecv.search.space import Drawn, check_choices, draw, resolve, told
from scalecv.search.trials import Point, Trial
from scalecv.search.under_way import UnderWay
from scalecv.shards.store import open_dataset
from scalecv.train import runs
from scalecv.train.job import Pause
from scalecv.train.run import same_everywhere
from scalecv.train.signals import stop_on_signals

Event = dict[str, Any]
DEATHS = 2
"""Processes of one segment that may die (a spot machine, a memory limit) before its trial counts as failed."""
DRAW_S = 120.0
WATCH_S = 0.5
NOTHING = 0.01
"""Share of the budget that is as good as nothing."""


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
    experiment = prepared(same_everywhere(experiment))
    dataset = open_dataset(experiment.data.uri, experiment.data.version)
    approve = approval(dataset.manifest)
    if experiment.search.scheduler == "pbt":
        check_living(experiment)
    draw(experiment, 0, approve)  # a space that cannot work is told before anything is written
    if not is_begun(runs.home(experiment)):
        tell({"kind": "progress", "message": "seeing that each choice of search.space can be tried"})
        check_choices(experiment, approve)
    storage.check_writable(runs.home(experiment))
    with runs.lease(experiment):
        ledger = Ledger(runs.home(experiment), experiment, dataset.version)
        data = experiment.data.model_copy(update={"version": ledger.version})
        experiment = experiment.model_copy(update={"data": data})
        ledger.wake()
        return _Sweep(experiment, ledger, approve, tell).run(code_dirs)


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
        sign = -1.0 if is_cost(self.metric) else 1.0
        search = experiment.search
        self.grid = (
            runnable(experiment, approve, lambda line: tell({"kind": "progress", "message": line}))
            if search.searcher == "grid"
            else []
        )
        if self.grid:  # of which some may have been drawn that can run no more
            gone = sum(one.overrides not in self.grid for one in ledger.trials)
            search = search.model_copy(update={"trials": len(self.grid) + gone})
        if search.scheduler == "pbt":  # values change on the way, so no seed can repeat a trial
            search = search.model_copy(update={"finalists": 0})
        flat = flatten(experiment.model_dump(mode="json", exclude={"search"}))
        written = {key: flat[key] for key in written_keys(experiment) if key in flat}
        error = ERROR / 2**ledger.verdicts_before  # all together err seldom, however often it goes on
        self.plan = Plan(search, experiment.train.epochs, sign, *ledger.rung, written, error)
        # What a trial's process finds in its own folder and environment may be another place.
        uri = tracking.tracking_uri(experiment.track.uri)
        self.place = {"uri": uri} if storage.without_secrets(uri) == uri else {}
        self.devices = max(1, experiment.scale.workers)
        self.under_way = UnderWay(self.devices)
        self.failure = ""
        self.stopping, self.closing, self.spent_all = threading.Event(), threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self.record = Record(experiment, ledger, self.plan, tell)
        self._drawn: Drawn | None = None

    def run(self, code_dirs: tuple[str, ...]) -> Swept:
        """Run until nothing is left to do."""
        status = "FAILED"
        try:
            if self._next() is not None:
                self._run_tune(code_dirs)
                self.ledger.wake()
            elif self._is_spent():
                self.record.say(f"search.budget={self.plan.search.budget} is spent: a larger one goes on")
            if self.failure:
                raise ScalecvError(self.failure)
            if self._next() is not None:
                status = "KILLED"
                raise Interrupted(
                    f"stopped as asked, all trials are kept in {self.ledger.home}: the same command goes on"
                )
            if self.ledger.trials and all(one.status == "failed" for one in self.ledger.trials):
                raise ScalecvError(
                    f"all {len(self.ledger.trials)} trials failed, such as: {self.ledger.trials[-1].cause}"
                )
            status = "FINISHED"
            self.record.stand(is_last=True)
            swept = self._swept()
            if swept.verdict.pairs:
                self.ledger.judged()
            return replace(swept, report=self.record.report(swept))
        finally:
            if status != "FINISHED":
                self.record.stand(is_last=True)
            self.record.end(status)

    def suggest(self, tune_id: str) -> dict[str, Any] | str | None:
        """The next segment, for `ray_tune.run`."""
        from scalecv.search.ray_tune import FINISHED

        with self.lock:
            ends = self.failure or self.stopping.is_set()
            try:
                trial = None if ends else self._next_drawn()
                if trial is None:
                    return None if self.under_way and not ends else FINISHED
                trial = replace(trial, status="running")
                self.ledger.keep(trial)
            except ScalecvError as error:
                self.failure = str(error)
                return FINISHED
            self.under_way.begin(tune_id, trial)
        how = f"goes on after epoch {trial.epochs}" if trial.points else "begins"
        values = "" if trial.points or trial.entrant is not None else f": {told(trial.overrides)}"
        self.record.say(f"{self._told(trial)} {how}{values}")
        until = None if trial.until is None else (trial.until, self.plan.in_seconds)
        return {"until": until, "experiment": json.dumps(self._of(trial).model_dump(mode="json"))}

    def ended(self, tune_id: str, result: dict[str, Any] | None) -> None:
        """Record what a segment told; nothing told means that its process died."""
        with self.lock:
            outcome = result or {"status": "failed", "cause": f"its process died {DEATHS + 1} times: out of memory?"}
            begun, held_s = self.under_way.end(tune_id, outcome.pop("device_s", None))
            if begun is None:
                return
            trial = self._record_of(begun)
            told_points = [Point(**point) for point in outcome.pop("points", ())]
            points = tuple(point for point in told_points if point.epoch > trial.inherited) or trial.points
            spent = trial.device_s + held_s
            # What was trained under a driver that was killed counts, too.
            spent = max(spent, points[-1].device_s if points and trial.parent is None else 0.0)
            trial = replace(trial, points=points, device_s=spent, **outcome)
            try:
                self.ledger.keep(trial)
            except ScalecvError as error:
                self.failure = str(error)
            now = f"{self.metric} {points[-1].value:.4f} after epoch {trial.epochs}" if points else "no epoch has ended"
            self.record.say(f"{self._told(trial)} {trial.status}: {trial.cause or now}")
            self.record.stand()
            if trial.status == "failed":
                self.failure = self.failure or hopeless(self.ledger.trials, self.experiment.name) or ""

    def _next(self) -> Trial | int | None:
        """What runs next, of the search and then of the race."""
        if self.spent_all.is_set() or self._is_spent():
            return None
        found, is_closed = next_training(*self._stands(), self.closing.is_set(), self._searching())
        if self.closing.is_set() and not is_closed:
            self.closing.clear()
            self.record.say("what is left of search.budget pays no race: the search goes on with it")
        return found

    def _stands(self) -> tuple[Plan, list[Trial], list[Trial], float]:
        return self.plan, self.ledger.trials, self.ledger.race, self._budget_left_s()

    def _searching(self) -> int:
        """Devices that the search holds."""
        return self.devices * sum(one.entrant is None for one in self.under_way.trials)

    def _is_spent(self) -> bool:
        return self._budget_left_s() < NOTHING * (self.plan.search.budget_s or 0.0)

    def _budget_left_s(self) -> float:
        if self.plan.search.budget_s is None:
            return math.inf
        return self.plan.search.budget_s - self.ledger.device_s - self.under_way.held_s

    def _next_drawn(self) -> Trial | None:
        """What runs next, with its values.

        Raises: ConfigError: no values of the space can run. ScalecvError: a checkpoint could not be copied.
        """
        found = self._next()
        if isinstance(found, int):
            # Equal members of a population part when they change; elsewhere the same values are the same training.
            tried = [] if self.plan.search.scheduler == "pbt" else [one.overrides for one in self.ledger.trials]
            values = values_of(self.plan, self.ledger.trials, self.grid)
            try:
                drawn = draw(self.experiment, found, self.approve, values, tried)
            except ConfigError:  # of a space in which little can run
                if not found:
                    raise
                drawn = None
            if drawn is None:
                self.record.say(
                    f"no trial begins any more: nothing was drawn that can run and is not among the {found} tried"
                )
                search = self.plan.search.model_copy(update={"trials": found})
                self.plan = replace(self.plan, search=search)
                return self._next_drawn()
            self._drawn = drawn
            for reason in drawn.left_out:
                self.record.say(f"left out {reason}")
            return Trial(found, drawn.overrides, until=self.plan.first(found))
        if found is None:
            return None
        if found.parent is not None and found.number == len(self.ledger.trials):
            child = replace(found, overrides=perturbed(self.experiment, found))
            try:
                self.approve(resolve(self.experiment, child.overrides))
            except UserError:
                child = found
            # While its parent stands at the rung: later the checkpoint would be another.
            runs.begin_with(self._of(child), self._of(self.ledger.trials[found.parent]))
            return child
        return found

    def _record_of(self, trial: Trial) -> Trial:
        return (self.ledger.trials if trial.entrant is None else self.ledger.race)[trial.number]

    def _of(self, trial: Trial) -> Experiment:
        drawn = self._drawn  # just now, where it is of this trial
        is_known = drawn is not None and drawn.overrides is trial.overrides
        made = drawn.experiment if drawn and is_known else resolve(self.experiment, trial.overrides)
        track = made.track.model_copy(update={"storage": storage.join(self.ledger.home, "runs"), **self.place})
        later = 0 if trial.seed is None else 1 + trial.seed  # the race never uses the seed of the search
        return made.model_copy(update={"name": self._name(trial), "track": track, "seed": made.seed + later})

    def _name(self, trial: Trial) -> str:
        return trial.run_name(self.experiment.name)

    def _told(self, trial: Trial) -> str:
        if trial.entrant is None:
            return f"trial {trial.number}"
        return f"race, {entrant_name(trial.entrant)}, seed {trial.seed}:"

    def _swept(self) -> Swept:
        """How it ended; trials that wait are stopped, unless a larger sweep goes on with them."""
        places = {one.replaces: one.number for one in self.ledger.trials if one.replaces is not None}
        trials = tuple(_as_ended(one, places.get(one.number)) for one in self.ledger.trials)
        about = (self.ledger.key, self.experiment.name, self.metric)
        least_s = least_budget_s(self.plan, trials)
        found = verdict(self._standing(), self.metric, best_of(self.plan, trials), self.plan.search, least_s)
        best = best_trial(found, trials, self.ledger.race, self.plan)
        race = tuple(self.ledger.race)
        return Swept(
            *about,
            trials,
            race,
            best,
            found,
            self.ledger.device_s,
            self.record.run_id,
            storage.without_secrets(self.record.uri),
        )

    def _standing(self) -> Standing:
        left_s = 0.0 if self._is_spent() else self._budget_left_s()
        return standing_of(self.plan, self.ledger.trials, self.ledger.race, left_s)

    def _run_tune(self, code_dirs: tuple[str, ...]) -> None:
        self.record.say("joining Ray, or starting it")
        runtime.connect(code_dirs=code_dirs)
        from scalecv.search.ray_tune import run

        runs.check_shared(self.ledger.home, runtime.nodes())
        scale = self.experiment.scale
        cpus, gpus = runtime.resources()
        use_gpu = scale.gpu == "yes" or (scale.gpu == "auto" and gpus >= self.devices)
        runtime.check_fits(self.devices, scale.cpus_per_worker, use_gpu)
        room = int(min(cpus // (self.devices * scale.cpus_per_worker), gpus // self.devices if use_gpu else cpus))
        most = min(room, self.plan.search.concurrent or room)
        self.record.say(f"{len(self.ledger.trials)} of {self.plan.search.trials} trials begun; {most} at a time")
        tags = {"scalecv.sweep": self.ledger.key, tracking.PARENT_KEY: self.ledger.key}
        # Of several workers Ray Train asks for the CPUs; beside them the trial itself may take none.
        alone = {"CPU": scale.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        resources = {"memory": 1.0} if scale.workers else alone
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,), name="budget", daemon=True)
        with tempfile.TemporaryDirectory(prefix="scalecv-tune-") as folder:
            segment = _Segment(self.metric, tags, code_dirs, self.plan.search.cost)
            watch.start()
            try:
                with stop_on_signals(self.stopping.set, self.tell):
                    run(self.suggest, self.ended, self.under_way.died, folder, segment, resources, most, DEATHS)
            finally:
                ended.set()
                watch.join()
                self.ledger.settle()

    def _watch(self, ended: threading.Event) -> None:
        """Ask runs to save and stop: all where the sweep is to stop or the budget is spent, else what has no room.

        Again and again, for a run that is about to begin takes away what lies there.
        """
        drawn_at, drawing = time.monotonic(), threading.Thread()
        while not ended.wait(WATCH_S):
            if time.monotonic() - drawn_at > DRAW_S and not drawing.is_alive():
                drawing = threading.Thread(target=self.record.draw, name="pictures", daemon=True)
                drawing.start()  # it takes seconds, and nothing else may wait for it
                drawn_at = time.monotonic()
            try:
                self._look()
            except Exception as error:  # a budget that nobody watches would be spent without end
                with self.lock:
                    self.failure = self.failure or f"the budget is watched no more, {type(error).__name__}: {error}"
                self.stopping.set()
        if drawing.is_alive():
            drawing.join()  # the report draws the same files

    def _look(self) -> None:
        """One look of `_watch`."""
        for name, trial in self.under_way.waiting.items():
            with contextlib.suppress(OSError, ScalecvError):
                if runs.newest(self._of(trial)):
                    self.under_way.is_seen(name)
        with self.lock:
            if self._budget_left_s() <= 0 and not self.spent_all.is_set():
                self.spent_all.set()
                self.record.say(
                    f"search.budget={self.plan.search.budget} is spent: trials under way are saved and stop"
                )
            running = self.under_way.trials
            searching = self._searching()
            is_over = searching and search_left_s(*self._stands(), searching) <= 0
            if is_over and not self.closing.is_set():
                self.closing.set()
                self.record.say("what is left of search.budget is for the best trial and the race: the others pause")
            if not (self.stopping.is_set() or self.spent_all.is_set()):
                best = leader(self.plan, self.ledger.trials) if self.closing.is_set() else None
                pausing = [one for one in running if self.closing.is_set() and one.entrant is None]
                running = [one for one in pausing if best is None or one.number != best.number]
        for trial in running:
            with contextlib.suppress(OSError, ScalecvError):
                if place := runs.newest(self._of(trial)):
                    storage.put(storage.join(place, "STOP"), b"stop")


def _as_ended(trial: Trial, replaced_by: int | None) -> Trial:
    """A trial as it is told once the sweep is over."""
    if trial.status == "waiting":
        return replace(trial, status="stopped", cause=f"the budget was spent after epoch {trial.epochs}")
    if trial.status == "paused":
        why = "behind others" if replaced_by is None else f"trial {replaced_by} took its place"
        return replace(trial, status="stopped", cause=f"{why} after epoch {trial.epochs}")
    return trial


@dataclass(frozen=True)
class _Segment:
    """What Tune runs in a process of the cluster."""

    metric: str
    tags: dict[str, str]
    code_dirs: tuple[str, ...]
    cost: str | None

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        experiment = Experiment.model_validate(json.loads(config["experiment"]))
        until = None if config["until"] is None else Pause(*config["until"])
        return run_segment(experiment, self.metric, until, self.tags, self.code_dirs, cost=self.cost)
