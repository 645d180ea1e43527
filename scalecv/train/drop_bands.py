"""`scalecv bands --drop EXPERIMENT`: one training with all bands, and one without each of them in turn."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scalecv.batches.pixels import pixels_of
from scalecv.config import Experiment, build, with_overrides
from scalecv.display import duration
from scalecv.errors import ConfigError
from scalecv.shards.store import open_dataset
from scalecv.train.run import train

Event = dict[str, Any]


@dataclass(frozen=True)
class Dropped:
    """A run without one band, or with all."""

    band: int | None
    """Counted from 1 in the order of the file; None for the run with all bands."""
    name: str
    run_id: str | None
    value: float
    """Of the run's metric, at its best epoch."""
    lost: float
    """What the metric lost against all bands, or a loss gained; one seed, so a small number is noise."""


def drop_bands(
    experiment: Experiment, *, code_dirs: tuple[str, ...] = (), tell: Callable[[Event], None] = lambda _: None
) -> tuple[str, tuple[Dropped, ...]]:
    """Train with all bands and without each, as runs NAME and NAME-without-3; finished ones are taken as they are.

    Returns: the metric's name, and the runs, the largest loss first; the run with all bands stands before them.
    Raises: ConfigError: one band only, or no val split to compare on.
    """
    from scalecv.tasks import TASKS
    from scalecv.tasks.task import is_cost

    metric = experiment.train.metric or f"val/{TASKS[experiment.task].headline}"
    manifest = open_dataset(experiment.data.uri, experiment.data.version).manifest
    if metric.startswith("val/") and not manifest.splits.get("val"):
        raise ConfigError(
            f"{experiment.data.uri} has no val split to compare bands on: ingest with --split 80/10/10, or with "
            "--split-folder FOLDER=val; nothing was started"
        )
    sign = -1 if is_cost(metric) else 1
    found: list[Dropped] = []
    wanted = list(runs_without(experiment))
    epochs = f"{experiment.train.epochs} epoch{'s' * (experiment.train.epochs > 1)}"
    tell({"kind": "progress", "message": f"{len(wanted)} trainings of {epochs}: all bands, and without each of them"})
    times: list[float] = []
    for done, (band, one) in enumerate(wanted):
        left = f", about {duration(max(times) * (len(wanted) - done))} left" if times else ""
        bands = f"without band {band}" if band else "all bands"
        tell({"kind": "progress", "message": f"{one.name} ({done + 1} of {len(wanted)}): {bands}{left}"})
        began = time.perf_counter()
        result = train(one, code_dirs=code_dirs, allow_import=True, tell=tell)
        times.append(time.perf_counter() - began)
        value = result.metrics[metric]
        found.append(Dropped(band, one.name, result.run_id, value, sign * (found[0].value - value) if found else 0.0))
    return metric, (found[0], *sorted(found[1:], key=lambda run: -run.lost))


def runs_without(experiment: Experiment) -> Iterator[tuple[int | None, Experiment]]:
    """The experiment with all its bands, then without each."""
    manifest = open_dataset(experiment.data.uri, experiment.data.version).manifest
    bands = experiment.data.bands or tuple(range(1, pixels_of(manifest, experiment.data, "").channels + 1))
    if len(bands) < 2:
        raise ConfigError(f"{experiment.data.uri} gives one band: there is none to leave out")
    tree = experiment.model_dump(mode="json")
    yield None, experiment
    for band in bands:
        name = f"{experiment.name}-without-{band}"
        keys = {"name": name, "data.bands": [other for other in bands if other != band], "model.in_channels": None}
        yield band, build(with_overrides(tree, keys), name)
