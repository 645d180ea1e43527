"""Which members make an ensemble, and whether it is better than one of them: pure functions of scores."""

from collections.abc import Callable, Sequence

import numpy as np

Counts = tuple[int, ...]
"""How often each candidate was drawn; its share of the mean."""
DRAWS, PATIENCE = 24, 4
"""Most draws of a selection, and those without a better mean after which it ends."""
RESAMPLES = 2000


def select(
    score: Callable[[Counts], float], costs: Sequence[float], budget: float, most: int
) -> tuple[Counts, float] | None:
    """Greedy forward selection with replacement: each draw adds the candidate that makes the best mean.

    A mean may get worse before it gets better, so draws go on for a while, and the best mean of all counts; among equal
    ones the first.

    Args:
        score: of a mean, larger is better; called once for each.
        costs: of each candidate, paid once however often it is drawn.
        budget: most that all members may cost together.
        most: members.
    Returns: the counts and their score; None where no candidate is within the budget.
    Source: Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004.
    """
    known: dict[Counts, float] = {}

    def of(counts: Counts) -> float:
        counts = _reduced(counts)
        if counts not in known:
            known[counts] = score(counts)
        return known[counts]

    counts: Counts = (0,) * len(costs)
    best: tuple[Counts, float] | None = None
    since = 0
    for _ in range(DRAWS):
        options = [drawn for at in range(len(costs)) if _fits(drawn := _with(counts, at), costs, budget, most)]
        if not options or since > PATIENCE:
            break
        counts = max(options, key=lambda drawn: (of(drawn), -_cost(drawn, costs)))
        since += 1
        if best is None or of(counts) > best[1]:
            best, since = (_reduced(counts), of(counts)), 0
    return best


def interval(
    gain: Callable[[np.ndarray], float], rows: int, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Between which values a gain lies, by a bootstrap over rows (percentiles).

    Args:
        gain: of rows, int64 [n] with repeats; both that are compared see the same ones.
        rows: how many there are.
        seed: of the resamples.
        confidence: share of the resamples between the two.
    """
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.arange(rows),),
        gain,
        n_resamples=RESAMPLES,
        vectorized=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _with(counts: Counts, at: int) -> Counts:
    return (*counts[:at], counts[at] + 1, *counts[at + 1 :])


def _fits(counts: Counts, costs: Sequence[float], budget: float, most: int) -> bool:
    return _cost(counts, costs) <= budget and sum(count > 0 for count in counts) <= most


def _cost(counts: Counts, costs: Sequence[float]) -> float:
    return sum(cost for count, cost in zip(counts, costs, strict=True) if count)


def _reduced(counts: Counts) -> Counts:
    """The smallest whole numbers of the same shares."""
    divisor = int(np.gcd.reduce(counts))
    return tuple(count // divisor for count in counts)
