"""Why training is slow, and one change that was tried: `scalecv doctor EXPERIMENT`.

The change is proposed only if it helped: runs with and without it take turns, and the confidence interval of the
ratio of their speeds must lie above one.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scalecv import cache, config, storage
from scalecv.batches.feed import threads_per_rank
from scalecv.config import Experiment
from scalecv.shards.store import open_dataset
from scalecv.speed import trial
from scalecv.speed.parts import Speeds, measure

PAIRS = 5
CONFIDENCE = 0.95
WAITS = 0.1
"""Share of waiting from which on the feed is what training lacks."""


@dataclass(frozen=True)
class Advice:
    """A change, and what it did."""

    change: dict[str, Any]
    """Dotted keys and their values."""
    why: str
    ratio: float
    """Speed with the change by speed without, geometric mean over the pairs."""
    low: float
    high: float
    """Ends of the confidence interval of the ratio."""
    pairs: int

    @property
    def helps(self) -> bool:
        """Whether the interval excludes a ratio of one."""
        return self.low > 1

    def line(self) -> str:
        """What a person should know of it."""
        said = " ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.change.items()
        )
        found = f"{self.ratio:.2f} times as fast ({self.low:.2f} to {self.high:.2f}, {self.pairs} pairs)"
        if self.helps:
            return f"set {said}: {found}. {self.why}"
        return f"{said} was tried and is not proposed: {found}"


def advise(
    path: str,
    overrides: Mapping[str, Any],
    *,
    attempt: Mapping[str, Any] | None = None,
    seconds: float = 60.0,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Speeds, Advice | None]:
    """Name what takes an experiment's time, and try a change against it.

    Args:
        path: the experiment file.
        overrides: dotted keys that are set.
        attempt: the change to try; None takes the first that fits the bottleneck.
        seconds: of training in all for the change.
        tell: called with lines of progress.
    Returns: the speeds, and the advice; None where there is nothing to try.
    """
    experiment = config.load(path, overrides)
    speeds = measure(experiment, tell=tell)
    change, why = (dict(attempt), "") if attempt else candidate(experiment, speeds)
    if not change:
        return speeds, None
    other = config.load(path, {**overrides, **change})
    tell(f"trying {', '.join(f'{key}={_as_yaml(value)}' for key, value in change.items())}, {PAIRS} pairs of runs")
    return speeds, _compare(experiment, other, change, why, seconds / (2 * PAIRS))


def candidate(experiment: Experiment, speeds: Speeds) -> tuple[dict[str, Any], str]:
    """The first change that fits the bottleneck, and what else is to know of it; empty where none is known."""
    data, train = experiment.data, experiment.train
    if speeds.data_wait_share > WAITS:
        if speeds.bottleneck == "reading" and not storage.is_local(data.uri) and not experiment.cache.dir:
            return {"cache.dir": str(cache.user_folder())}, "Any folder on a local disk does."
        if speeds.bottleneck == "decoding" and data.decode != "gpu" and _gpu_may_decode(experiment):
            return {"data.decode": "gpu"}, "The GPU's pixels are others: look at the metric, too."
        threads = threads_per_rank(data.decode_threads, 1)
        cores = threads_per_rank(None, 1)
        more = 2 * threads if threads < cores else threads + 1
        return {"data.decode_threads": more}, "The feed is slower than the network."
    if not train.channels_last:
        return {"train.channels_last": True}, "The result changes by rounding only."
    if train.precision == "fp32":
        return {"train.precision": "bf16"}, "Look at the metric: numbers have fewer digits."
    if not train.compile:
        return {"train.compile": True}, "The first step of each process takes longer."
    return {}, ""


def _gpu_may_decode(experiment: Experiment) -> bool:
    """Whether a GPU could decode most of the first rows."""
    import torch

    from scalecv.batches.feed import Feed
    from scalecv.batches.gpu import GpuDecoder, hindrance
    from scalecv.batches.pixels import pixels_of

    if experiment.scale.gpu == "no" or not torch.cuda.is_available():
        return False
    data, device = experiment.data, torch.device("cuda")
    dataset = open_dataset(data.uri, data.version, experiment.cache)
    how = pixels_of(dataset.manifest, data, data.uri, experiment.task)
    if hindrance(how, device):
        return False
    rows, gpu = Feed(dataset, "train", how, experiment.train.batch).some_rows(64), GpuDecoder(how, device)
    return sum(gpu.job(row, None) is not None for row in rows) > len(rows) / 2


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios, and its confidence interval by Student's t on their logarithms."""
    from scipy.stats import t

    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * error
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def _compare(plain: Experiment, other: Experiment, change: dict[str, Any], why: str, seconds: float) -> Advice:
    ratios = []
    for number in range(PAIRS):
        speed = {}
        for one in (plain, other) if number % 2 else (other, plain):
            dataset = open_dataset(one.data.uri, one.data.version, one.cache)
            speed[one is other] = trial.run(one, dataset, seconds).images_per_s
        ratios.append(speed[True] / speed[False])
    return Advice(change, why, *interval(ratios), len(ratios))


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
