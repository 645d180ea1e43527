"""What enlarging its images costs an experiment, and what it gains: `scalecv bench upscale EXPERIMENT`.

All variants take turns in this process, so that what else the machine does falls on all of them alike.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scalecv.config import Experiment, Upscale
from scalecv.shards.store import Dataset, open_dataset
from scalecv.speed import trial

STEPS = 2
"""Steps of a turn that count, at least."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    factor: int
    method: str
    """native, bicubic or sr."""
    step_s: float
    """Of a training step without the wait for its batch; median over the rounds."""
    epoch_s: float
    per_pixel: float
    """Seconds for each pixel that the network sees, by those at factor 1; median of the rounds' ratios."""
    memory_gb: float
    """Largest growth of the process while it trained; on a GPU, what torch took of it."""
    micro_batch: int
    quality: float | None = None
    """The metric that decides, after --epochs."""
    per_hour: float | None = None
    """It, by hours of training on this device."""


@dataclass(frozen=True)
class Comparison:
    """All lines."""

    rows: tuple[Row, ...]
    metric: str
    epochs: int

    def lines(self) -> list[str]:
        """The table for a person."""
        heads = ["side", "method", "s/epoch", "s/step", "per pixel", "GB", "at a time", self.metric, "per hour"]
        if not self.epochs:
            heads = heads[:-2]
        cells = [heads]
        for row in self.rows:
            told = [f"x{row.factor}", row.method, f"{row.epoch_s:.1f}", f"{row.step_s:.2f}", f"{row.per_pixel:.2f}"]
            told += [f"{row.memory_gb:.2f}", str(row.micro_batch)]
            if row.quality is not None and row.per_hour is not None:
                told += [f"{row.quality:.4f}", f"{row.per_hour:.3g}"]
            cells.append(told)
        wide = [max(len(line[at]) for line in cells) for at in range(len(heads))]
        return ["  ".join(cell.rjust(size) for cell, size in zip(line, wide, strict=True)) for line in cells]


def compare(
    experiment: Experiment,
    factors: Sequence[int],
    *,
    model: str | None = None,
    rounds: int = 2,
    seconds: float = 5.0,
    epochs: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measure an experiment with its images at several sizes.

    Args:
        experiment: at the native size; an empty train.micro_batch becomes auto.
        factors: 1 first, then some of 2 and 4.
        model: a network of task=upscale to measure besides bicubic; else that of the experiment, if it has one.
        rounds: times that all take their turn.
        seconds: of steps for each turn.
        epochs: to train each variant for its quality; 0 trains none.
        tell: called with lines of progress.
    Raises: UserError: the experiment cannot be run, at one of the sizes.
    """
    from scalecv.tasks import TASKS
    from scalecv.train import upscaler
    from scalecv.train.checks import check
    from scalecv.train.run import same_everywhere

    dataset = open_dataset(experiment.data.uri, experiment.data.version, experiment.cache)
    runs = [same_everywhere(one) for one in _variants(trial.one_worker(experiment), factors, model)]
    for one in runs:
        check(one, dataset.manifest)
        upscaler.check(one, dataset.manifest)
    turns = []
    for number in range(rounds):
        turns.append(list[_Turn]())
        for one in runs:
            tell(f"round {number + 1} of {rounds}: x{one.upscale.factor} {_method(one)}")
            turns[-1].append(_turn(one, dataset, seconds))
    rows = [_row(one, dataset, [turn[at] for turn in turns], turns) for at, one in enumerate(runs)]
    split = "val" if dataset.manifest.splits.get("val") else "test"
    metric = experiment.train.metric or f"{split}/{TASKS[experiment.task].headline}"
    if epochs:
        for at, one in enumerate(runs):
            tell(f"{epochs} epochs: x{one.upscale.factor} {_method(one)}")
            quality, hours = _quality(one, dataset, metric, epochs)
            rows[at] = replace(rows[at], quality=quality, per_hour=quality / max(hours, 1e-9))
    return Comparison(tuple(rows), metric, epochs)


def _variants(experiment: Experiment, factors: Sequence[int], model: str | None) -> list[Experiment]:
    from scalecv.artifacts import tracking
    from scalecv.train import upscaler

    model = model or experiment.upscale.model
    stages = [Upscale(factor=1)]
    stages += [Upscale(factor=factor) for factor in factors if factor > 1]
    if model:
        own = upscaler.factor_of(tracking.lookup(model, experiment.track.uri))
        reached = [factor for factor in factors if factor > 1 and factor in (own, own**2)]
        stages += [Upscale(factor=factor, method="sr", model=model) for factor in reached]
    train = experiment.train.model_copy(update={"micro_batch": experiment.train.micro_batch or "auto"})
    return [experiment.model_copy(update={"upscale": stage, "train": train}) for stage in stages]


def _method(experiment: Experiment) -> str:
    return "native" if experiment.upscale.factor == 1 else experiment.upscale.method


@dataclass(frozen=True)
class _Turn:
    trial: trial.Trial
    step_s: float
    memory_gb: float


def _turn(experiment: Experiment, dataset: Dataset, seconds: float) -> _Turn:
    import torch

    from scalecv.train.memory import growth

    found: list[trial.Trial] = []
    on_gpu = experiment.scale.gpu != "no" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    grown = growth(lambda: found.append(trial.run(experiment, dataset, seconds, STEPS))) or 0.0
    busy = sum(took for part, took in found[0].seconds.items() if part != "wait")
    return _Turn(found[0], busy, (torch.cuda.max_memory_allocated() if on_gpu else grown) / 1e9)


def _row(experiment: Experiment, dataset: Dataset, mine: Sequence[_Turn], turns: Sequence[Sequence[_Turn]]) -> Row:
    factor, train = experiment.upscale.factor, experiment.train
    ratios = [turn.step_s / factor**2 / turns[at][0].step_s for at, turn in enumerate(mine)]
    rows = dataset.manifest.splits["train"]
    return Row(
        factor=factor,
        method=_method(experiment),
        step_s=statistics.median(turn.step_s for turn in mine),
        epoch_s=statistics.median(rows / turn.trial.images_per_s for turn in mine),
        per_pixel=statistics.median(ratios),
        memory_gb=max(turn.memory_gb for turn in mine),
        micro_batch=max(turn.trial.micro_batch for turn in mine) or int(train.micro_batch or train.batch),
    )


def _quality(experiment: Experiment, dataset: Dataset, metric: str, epochs: int) -> tuple[float, float]:
    """The metric of the best epoch, and the hours that training took without validation."""
    import torch

    from scalecv.train.job import Job, Place
    from scalecv.train.worker import work

    device = "cuda" if experiment.scale.gpu != "no" and torch.cuda.is_available() else "cpu"
    track = experiment.track.model_copy(update={"pictures": 0})
    short = experiment.model_copy(
        update={
            "scale": experiment.scale.model_copy(update={"workers": 0}),
            "train": experiment.train.model_copy(update={"epochs": epochs}),
            "track": track,
        }
    )
    took: list[float] = []

    def hear(events: list[dict[str, Any]]) -> None:
        took.extend(event["metrics"]["time/train_s"] for event in events if event.get("is_epoch_end"))

    with tempfile.TemporaryDirectory(prefix="scalecv-quality-") as folder:
        result = work(Job(short, dataset.version, folder, "threads"), Place(device=device), hear)
    return float(result["metrics"][metric]), sum(took) / 3600
