"""Whether runs that scored the same images differ: an effect, an interval that covers it, a p-value.

A difference of two configurations moves with the images that happened to be in the split, and with the seed. Each is
a variance of its own, with its own degrees of freedom:

- images: the paired bootstrap. Images are drawn with replacement, the same for all runs, and the metric is computed
  anew from the sums of what was drawn. Where few images carry the difference, its degrees of freedom are few.
- seeds: the differences of the runs with the same seed, or the spread of each side where the seeds are not the same.

The interval is value ± sqrt(sum of t² variance), each t of its own degrees of freedom: it covers at least as often as
it says (Banerjee 1961, Sankhya A 23), also with two seeds, where resampling seeds covers far too seldom.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalecv.metrics.pooled import Floats, Metric

DRAWS = 2000
MOST_UNITS = 10_000
"""More are added up in parts of equal size before they are drawn: sums of parts vary as their rows do."""
LEAST_UNITS = 6
"""With fewer, not even all of them on one side would be rare by chance (2 / 2^5 is more than 5 %)."""
LEVEL = 0.95
_STEP = 200
_POWER = 0.8416
"""Of the normal distribution, 80 % lie below."""

Seeds = Mapping[Any, Sequence[int]]
"""For each seed of a configuration the places of its runs."""


@dataclass(frozen=True)
class Drawn:
    """A metric of R runs on the same images."""

    whole: Floats
    """Of all images, [R]."""
    resampled: Floats
    """Of each resample, [R, draws]."""
    without: Floats
    """Of all but one unit (an image, a scene, or a part of many images), [R, units]."""


@dataclass(frozen=True)
class Effect:
    """How far a second configuration lies from a first."""

    value: float
    """Second minus first, each the mean over its seeds."""
    low: float
    high: float
    p: float
    detectable: float
    """The smallest difference that four of five such comparisons would show."""
    seeds: tuple[int, int]
    is_paired: bool
    """Whether both have the same seeds."""
    covers_seeds: bool
    """False: one seed each, so the interval says nothing of another training."""


def draw(sums: Sequence[Any], metric: Metric, scenes: Sequence[Any] | None = None, seed: int = 0) -> Drawn:
    """Compute a metric of resampled images.

    Args:
        sums: of each run what each image adds, scipy.sparse or numpy [N, D], all in one order of images.
        metric: of sums [..., D].
        scenes: for each image what it shares with others that resemble it; these are drawn together.
        seed: of the resamples.
    Raises: ValueError: fewer than LEAST_UNITS images or scenes.
    """
    from scipy import sparse

    parts = [_units(sparse.csr_array(one), scenes) for one in sums]
    count = parts[0].shape[0]
    if count < LEAST_UNITS:
        raise ValueError(f"{count} {'images' if scenes is None else 'scenes'}, at least {LEAST_UNITS} are needed")
    totals = [np.asarray(one.sum(0), dtype=np.float64) for one in parts]
    columns = [one.T.tocsr() for one in parts]
    rng, resampled = np.random.default_rng(seed), np.empty((len(sums), DRAWS))
    for at in range(0, DRAWS, _STEP):
        some = min(_STEP, DRAWS - at)
        picks = rng.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
        times = np.bincount(picks.ravel(), minlength=some * count).reshape(some, count).astype(np.float64)
        for run, one in enumerate(columns):
            resampled[run, at : at + some] = metric((one @ times.T).T)
    without = np.empty((len(sums), count))
    for run, (total, one) in enumerate(zip(totals, parts, strict=True)):
        for at in range(0, count, _STEP):
            without[run, at : at + _STEP] = metric(total - one[at : at + _STEP].toarray())
    return Drawn(np.array([float(metric(total)) for total in totals]), resampled, without)


def effect(found: Drawn, a: Seeds, b: Seeds) -> Effect:
    """The difference b - a of two configurations, each of one or more seeds."""
    is_paired = len(a) > 1 and set(a) == set(b)
    order = list(a), list(a) if is_paired else list(b)

    def by_seed(values: Floats) -> list[Floats]:
        sides = zip((a, b), order, strict=True)
        return [np.stack([values[list(of[seed])].mean(0) for seed in seeds]) for of, seeds in sides]

    whole, resampled, without = (by_seed(values) for values in (found.whole, found.resampled, found.without))
    value = float(whole[1].mean() - whole[0].mean())
    seeds = _of_seeds(*whole, is_paired=is_paired)
    units = without[0].shape[1]
    images = _of_images(*resampled, is_paired=is_paired) * units / (units - 1)
    parts = [(images, _carriers(without[1].mean(0) - without[0].mean(0)) - 1), *seeds]
    half = _half(parts, 1 - LEVEL)
    spread = sum(variance for variance, _ in parts) ** 0.5
    return Effect(
        value=value,
        low=value - half,
        high=value + half,
        p=_p(abs(value), parts),
        detectable=half + _POWER * spread,
        seeds=(len(a), len(b)),
        is_paired=is_paired,
        covers_seeds=bool(seeds),
    )


def holm(p: Sequence[float]) -> list[float]:
    """P-values of several comparisons that were made at once (Holm 1979), in the order they came."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, at in enumerate(np.argsort(p, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = highest
    return adjusted


def _units(sums: Any, scenes: Sequence[Any] | None) -> Any:
    """What is drawn: the rows [N, D], or sums of those that belong together, as scipy.sparse."""
    from scipy import sparse

    units = np.arange(sums.shape[0]) if scenes is None else np.unique(scenes, return_inverse=True)[1]
    count = int(units.max(initial=-1)) + 1
    if count > MOST_UNITS:
        units, count = units * MOST_UNITS // count, MOST_UNITS
    elif scenes is None:
        return sums
    member = (np.ones(len(units)), (units, np.arange(len(units))))
    return sparse.csr_array(member, shape=(count, len(units))) @ sums


def _of_seeds(a: Floats, b: Floats, *, is_paired: bool) -> list[tuple[float, float]]:
    """(variance, degrees of freedom) of the mean difference because of training noise; none for one seed each."""
    if is_paired:
        return [(float((b - a).var(ddof=1)) / len(a), len(a) - 1)]
    several = [side for side in (a, b) if len(side) > 1]
    if len(several) == 1:  # the other side's noise is taken to be the same
        side = several[0]
        return [(float(side.var(ddof=1)) * (1 + 1 / len(side)), len(side) - 1)]
    return [(float(side.var(ddof=1)) / len(side), len(side) - 1) for side in several]


def _of_images(a: Floats, b: Floats, *, is_paired: bool) -> float:
    """Variance of the mean difference over resamples [seeds, draws], without what `_of_seeds` holds already.

    Each seed errs on images of its own, and that is also in the spread of the seeds.
    """
    variance = float((b.mean(0) - a.mean(0)).var(ddof=1))
    for side in [b - a] if is_paired else [a, b]:
        if len(side) > 1:
            own = side.var(1, ddof=1).mean() - side.mean(0).var(ddof=1)
            variance -= float(own) / (len(side) - 1)
    return max(0.0, variance)


def _carriers(without: Floats) -> float:
    """How many units carry a difference: all of them where each moves it alike, k where only k move it at all."""
    influence = without - without.mean()
    power = float((influence**2).sum())
    return len(without) if power == 0 else power**2 / float((influence**4).sum())


def _half(parts: Sequence[tuple[float, float]], rare: float) -> float:
    """Half the width of the interval that a difference of nothing leaves with this probability at most."""
    from scipy.special import stdtrit

    return float(sum(stdtrit(max(1.0, free), 1 - rare / 2) ** 2 * variance for variance, free in parts) ** 0.5)


def _p(value: float, parts: Sequence[tuple[float, float]]) -> float:
    """The probability whose interval just reaches the value."""
    low, high = -12.0, 0.0  # of its logarithm
    if value == 0.0:
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _half(parts, 10**middle) < value else (middle, high)
    return float(10**high)
