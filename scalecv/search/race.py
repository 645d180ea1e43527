"""Who is best, and whether that can be said: finalists trained again on new seeds, the same for all.

A trial that came first among many was partly lucky, so its own score does not count here. Each seed is a block: what a
seed does to all entrants alike is taken out, what is left is the noise that differences are measured against, pooled
over entrants (two-way analysis of variance). Pairs are told apart by Tukey's studentised range, at 5 % over all pairs
and over all looks together, half of that for each verdict that the sweep had before. Little of it is spent on the early
looks, so a race ends early for a large difference, or when more seeds could change nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from scalecv.search.schedule import ERROR, Plan, finalists, race_s
from scalecv.search.trials import AS_WRITTEN, Trial

FIRST_LOOK = 3
"""Seeds before the first look."""
EARLY = 0.4
"""Of the chance of error, what all looks but the last spend together, at most; and a quarter of that each."""


@dataclass(frozen=True)
class Pair:
    """Two entrants, the better one first."""

    better: int
    other: int
    effect: float
    """Mean difference of the objective over the seeds, at least 0."""
    low: float
    high: float
    """Simultaneous interval, of 95 % unless the race is looked at again."""
    is_told_apart: bool
    seeds: int


@dataclass(frozen=True)
class Standing:
    """How a race stands."""

    needs: tuple[tuple[int, int], ...] = ()
    """(entrant, seed) to be trained next; empty: the race is over."""
    order: tuple[int, ...] = ()
    """Entrants, the best mean first, those that dropped out last."""
    pairs: tuple[Pair, ...] = ()
    """The best against each other."""
    tied: tuple[int, ...] = ()
    """Entrants that nothing separates from the best."""
    means: Mapping[int, float] = field(default_factory=dict)
    seeds: int = 0
    """That all which are left have in common."""
    error: float = ERROR
    """Chance of telling any difference where there is none."""


def next_heat(plan: Plan, trials: Sequence[Trial], race: Sequence[Trial], left_s: float) -> Trial | None:
    """The next training of the race; None while nothing can start, and where the race is over.

    Args:
        plan: of the sweep.
        trials: records of the search, which is over.
        race: records of the race.
        left_s: device-seconds that are left of the budget.
    """
    known = {(one.entrant, one.seed): one for one in race}
    for entrant, seed in standing_of(plan, trials, race, left_s).needs:
        record = known.get((entrant, seed))
        if record is None:
            overrides = {} if entrant == AS_WRITTEN else trials[entrant].overrides
            return Trial(len(race), overrides, entrant=entrant, seed=seed)
        if record.status == "waiting":
            return record
    return None


def standing_of(plan: Plan, trials: Sequence[Trial], race: Sequence[Trial], left_s: float) -> Standing:
    """How the race of a sweep stands. No seed begins that what is left of the budget cannot pay for all entrants.

    Where nothing is left in the middle of a seed, the whole ones before it are judged.
    """
    values: dict[int, dict[int, float]] = {}
    for one in race:
        if one.entrant is not None and one.seed is not None and one.status in ("finished", "failed"):
            value = plan.sign * one.value(plan.sign) if one.status == "finished" else math.nan
            values.setdefault(one.entrant, {})[one.seed] = value
    entrants = _entrants(plan, trials)
    how = (entrants, values, plan.search.seeds, plan.sign, plan.error)
    found = standing(*how)
    next_seed = min((seed for _, seed in found.needs), default=0)
    is_begun = any(one.seed == next_seed and one.entrant in entrants for one in race)
    took = {one.entrant: one.device_s for one in race if one.status == "finished"}
    price = sum(took.get(entrant, 0.0) for entrant, _ in found.needs)
    if next_seed >= FIRST_LOOK and (left_s <= 0 or (not is_begun and price > left_s)):
        return standing(*how, ends_after=next_seed)
    return found


def _entrants(plan: Plan, trials: Sequence[Trial]) -> list[int]:
    """The finalists, as many as the budget can race over the first seeds, and the experiment as written."""
    left_s = (plan.search.budget_s or math.inf) - sum(one.device_s for one in trials)
    for count in range(plan.search.finalists, 0, -1):
        found = finalists(plan, trials, count)
        if found and race_s(plan, trials, count) <= left_s:
            return [*(one.number for one in found), AS_WRITTEN]
    return []


def standing(
    entrants: Sequence[int],
    values: Mapping[int, Mapping[int, float]],
    most: int,
    sign: float = 1.0,
    error: float = ERROR,
    ends_after: int | None = None,
) -> Standing:
    """What a race says, or which trainings it needs to say more.

    An entrant that is worse than the best drops out at once. The race ends when one is left, when all seeds are used,
    or when more seeds could not tell the rest apart, even if their difference were a standard error larger than it is.

    Args:
        entrants: numbers.
        values: entrant -> seed -> objective; an entrant with one that is no number drops out.
        most: seeds that were planned.
        sign: 1 where a larger objective is better, else -1.
        error: chance of telling any difference where there is none.
        ends_after: seeds after which the race ends, whatever it says; None: `most`.
    """
    last = ends_after or most
    alive = [one for one in entrants if all(map(math.isfinite, values.get(one, {}).values()))]
    out: list[Pair] = []
    if len(alive) < 2:
        return Standing(order=tuple(alive), tied=tuple(alive), error=error)
    for seeds in range(FIRST_LOOK, last + 1):
        missing = [(one, seed) for seed in range(seeds) for one in alive if seed not in values.get(one, {})]
        if missing:
            return Standing(needs=tuple(missing))
        table = sign * np.array([[values[one][seed] for seed in range(seeds)] for one in alive])
        best = int(np.argmax(table.mean(axis=1)))
        found = _against(alive, table, best, error * _share(seeds, last, most))
        worse = {pair.other for pair in found if pair.is_told_apart}
        rest = [pair for pair in found if not pair.is_told_apart]
        if (
            rest
            and seeds < last
            and any(_may_part(pair, table, last, error * _share(last, last, most)) for pair in rest)
        ):
            out += [pair for pair in found if pair.is_told_apart]
            alive = [one for one in alive if one not in worse]
            continue
        order = [alive[at] for at in np.argsort(-table.mean(axis=1), kind="stable")]
        dropped = [pair.other for pair in reversed(out)]
        means = {one: float(sign * row.mean()) for one, row in zip(alive, table, strict=True)}
        means |= {one: float(np.mean(list(values[one].values()))) for one in dropped}
        tied = (alive[best], *(pair.other for pair in rest))
        return Standing((), (*order, *dropped), (*found, *out), tied, means, seeds, error)
    raise ValueError(f"a race has at least {FIRST_LOOK} seeds, found {last}")


def _against(alive: list[int], table: "np.ndarray", best: int, error: float) -> list[Pair]:
    """The best against each other one. `table`: entrants x seeds, larger is better."""
    entrants, seeds = table.shape
    means = table.mean(axis=1)
    half = _critical(entrants, seeds, error) * _noise(table)
    order = [at for at in np.argsort(-means, kind="stable") if at != best]
    return [
        Pair(alive[best], alive[at], effect, effect - half, effect + half, effect > half, seeds)
        for at in order
        for effect in [float(means[best] - means[at])]
    ]


def _noise(table: "np.ndarray") -> float:
    """Standard error of the mean of an entrant, without what a seed does to all."""
    entrants, seeds = table.shape
    rest = table - table.mean(axis=1)[:, None] - table.mean(axis=0) + table.mean()
    return math.sqrt(float((rest**2).sum()) / ((entrants - 1) * (seeds - 1)) / seeds)


def _share(seeds: int, last: int, most: int) -> float:
    """Of the chance of error, what a look may spend."""
    early = most - FIRST_LOOK
    each = min(EARLY / 4, EARLY / early) if early else 0.0
    return 1 - early * each if seeds == last else each


@lru_cache(maxsize=256)
def _critical(entrants: int, seeds: int, error: float) -> float:
    """Of the studentised range."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(1 - error, entrants, (entrants - 1) * (seeds - 1)))


def _may_part(pair: Pair, table: "np.ndarray", last: int, error: float) -> bool:
    """Whether the last look could tell a pair apart, if its difference were a standard error larger than it is."""
    noise, entrants = _noise(table), len(table)
    then = noise * math.sqrt(pair.seeds / last)
    return pair.effect + noise * math.sqrt(2) > _critical(entrants, last, error) * then
