"""`scalecv chaos`: a recipe of the user's is run once in peace and once with each fault; then all are compared."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scalecv import storage
from scalecv.chaos.faults import FAULTS
from scalecv.chaos.lab import Lab, NotHere
from scalecv.chaos.verdict import MEANING, Outcome, Run, share_done_once
from scalecv.config import Experiment
from scalecv.errors import ConfigError, ScalecvError, nearest
from scalecv.shards.store import open_dataset
from scalecv.testing.servers import NotStarted

EPOCHS = 3
CHECKPOINTS = 20
"""Checkpoints of a run, unless the recipe says how many."""


@dataclass(frozen=True)
class Report:
    """What all faults came to."""

    quiet: Run
    outcomes: list[Outcome]
    is_deterministic: bool
    """Whether two quiet runs are equal; taken for granted where no fault gave other weights."""
    folder: str

    @property
    def passed(self) -> bool:
        """Whether every fault that could be tried is survived."""
        return all(one.verdict in ("PASS", "NOT_RUN") for one in self.outcomes)

    @property
    def share_done_once(self) -> float:
        """Share of the steps done that were done for the first time."""
        return share_done_once(self.outcomes)

    def lines(self) -> list[str]:
        """What all of it means."""
        counts = {verdict: sum(one.verdict == verdict for one in self.outcomes) for verdict in MEANING}
        told = [f"{count} {verdict} ({MEANING[verdict]})" for verdict, count in counts.items() if count]
        if not self.is_deterministic:
            told.append("two quiet runs differ too: this recipe is not deterministic (train.exact=true makes it so)")
        return [*told, f"{self.share_done_once:.1%} of the steps were done once; runs and logs are in {self.folder}"]


def chaos(
    command: list[str],
    experiment: Experiment,
    given: Sequence[str],
    *,
    faults: Sequence[str],
    folder: Path,
    seed: int = 0,
    rounds: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run a recipe in peace, then with each fault, and compare.

    Args:
        command: the experiment file and the user's overrides, as for `scalecv train`.
        experiment: the same, resolved.
        given: dotted keys that the user has set; the rest may be shortened.
        faults: names out of FAULTS.
        folder: empty or missing; runs, logs and the MLflow store lie there.
        seed: of the steps at which faults come.
        rounds: times that each fault is tried.
        tell: called with a line for each thing that is done.
    Raises: ConfigError: no fault, an unknown one, or a folder that is not empty. ScalecvError: the quiet run fails.
    """
    if not faults:
        raise ConfigError(f"--faults is empty: expected some of {','.join(FAULTS)}")
    for name in faults:
        if name not in FAULTS:
            raise ConfigError(f"--faults {name}: expected some of {','.join(FAULTS)}{nearest(name, list(FAULTS))}")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--to {folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    lab = _lab(command, experiment, given, folder)
    quiet = _quiet(lab, "quiet")
    lab.steps = max(quiet.steps)  # fewer than planned where the recipe stops early
    tell(f"quiet    {lab.steps} steps in {quiet.seconds:.0f} s, weights {quiet.weights_hash[:12]}")
    lab.limit_s = max(300.0, 20 * quiet.seconds)
    draw, outcomes = random.Random(seed), []  # noqa: S311 - places of faults
    for number in range(rounds):
        for fault in faults:
            outcome = _try(lab, quiet, fault, number, draw)
            outcomes.append(outcome)
            tell(f"{fault:8} {outcome.verdict:9} {outcome.detail}")
    report = Report(quiet, outcomes, True, str(folder))
    if any(one.verdict == "SILENT" for one in outcomes):
        again = _quiet(lab, "quiet-again")
        report = replace(report, is_deterministic=again.weights_hash == quiet.weights_hash)
    return report


def _lab(command: list[str], experiment: Experiment, given: Sequence[str], folder: Path) -> Lab:
    epochs = experiment.train.epochs if "train.epochs" in given else min(EPOCHS, experiment.train.epochs)
    rows = open_dataset(experiment.data.uri, experiment.data.version).manifest.splits.get("train", 0)
    steps = math.ceil(rows / experiment.train.batch) * epochs
    data = storage.absolute(experiment.data.uri)
    forced: dict[str, object] = {"data.uri": data, "train.epochs": epochs, "track.log_every": 1, "track.pictures": 0}
    if experiment.track.checkpoint_steps is None:
        forced["track.checkpoint_steps"] = max(1, steps // CHECKPOINTS)
    return Lab(command, experiment, steps, folder.resolve(), forced=forced)


def _quiet(lab: Lab, name: str) -> Run:
    process = lab.process(name).start()
    try:
        run = lab.finish(process)
    finally:
        process.stop()
    if run.code != 0:
        raise ScalecvError(f"the recipe fails without any fault (exit code {run.code}): {run.said}")
    return run


def _try(lab: Lab, quiet: Run, fault: str, number: int, draw: random.Random) -> Outcome:
    step = draw.randint(1, max(1, lab.steps - 1))
    try:
        return FAULTS[fault](lab, quiet, f"{fault}-{number + 1}", step, random.Random(draw.random()))  # noqa: S311
    except (NotHere, NotStarted) as reason:
        return Outcome(fault, "NOT_RUN", str(reason), step)
    except TimeoutError as error:
        return Outcome(fault, "HARD_FAIL", str(error), step)
