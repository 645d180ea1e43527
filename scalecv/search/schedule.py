"""What runs next: a function of the records alone, so a driver that was started again decides as it would have.

Trials pause at rungs, with all of their state, and the scheduler says which go on. Rungs lie in epochs, or in
device-seconds, where a small network that trains many epochs is compared with a large one that trains few.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scalecv.config import Scalar
from scalecv.config.search import Search
from scalecv.search.trials import Point, Trial
from scalecv.train.job import Pause

FEWEST = 3
"""Trials of a rung from which on a median or a worst quarter is told; seeds of a race."""
GAIN_FROM = 8
"""Trials from which on an expected gain is told."""
BRACKETS = 4
"""Of hyperband."""
RACE_SHARE = 0.4
"""Of the budget, what is kept for the race at most, but for the smallest race: one finalist, three seeds."""
MOST_SHARE = 0.6
"""Of the budget, what the smallest race may take; where it takes more there is none."""
ERROR = 0.05
"""Of a verdict, the chance of telling any difference where there is none."""
ROUNDING = 1.02
"""Of what is kept, so that it is enough."""


@dataclass(frozen=True)
class _Known:
    """A trial as its points tell it."""

    points: tuple[Point, ...]
    value: float
    """Best so far, larger is better."""
    at_rungs: tuple[float, ...]
    """The same, at each rung that it reached, from that of its bracket on."""


@dataclass(frozen=True)
class Plan:
    """What stays the same through a sweep."""

    search: Search
    epochs: int
    """Of a whole training."""
    sign: float
    """1 where a larger objective is better, else -1."""
    rung: float
    """The first rung, in device-seconds or epochs."""
    in_seconds: bool
    as_written: Mapping[str, Scalar] = field(default_factory=dict)
    """Values that the experiment itself has for the keys of the space."""
    error: float = ERROR
    """Chance of error of the verdict; less where others were told of the same sweep."""
    _known: dict[int, "_Known"] = field(default_factory=dict, compare=False, repr=False)
    """Of each trial what was computed of its points last: thousands of trials are looked at again and again."""

    def known(self, trial: Trial) -> "_Known":
        """How far a trial came, and how good it was there."""
        found = self._known.get(trial.number)
        if found is None or found.points is not trial.points:
            self._known[trial.number] = found = self._look_at(trial)
        return found

    def _look_at(self, trial: Trial) -> "_Known":
        values, place = list[float](), bracket(self.search, trial.number)
        while (count := self.until(trial.points, self.level(place + len(values)))) is not None:
            values.append(trial.value(self.sign, count))
        return _Known(trial.points, trial.value(self.sign), tuple(values))

    def level(self, place: int) -> float:
        """Where a rung lies; the first has place 0."""
        ahead = place + 1 if self.search.scheduler in ("median", "pbt") else self.search.eta**place
        return self.rung * ahead

    def first(self, number: int) -> float | None:
        """Where a new trial pauses first."""
        return None if self.search.scheduler == "none" else self._rung_within(bracket(self.search, number))

    def after(self, trial: Trial) -> float | None:
        """The rung that follows those that a trial has reached; None: its end."""
        return self._rung_within(bracket(self.search, trial.number) + len(self.known(trial).at_rungs))

    def until(self, points: Sequence[Point], level: float) -> int | None:
        """How many points there are when a rung is reached, at the end of the epoch nearest to it; None: it is not."""
        before = None
        for count, point in enumerate(points, 1):
            at = point.device_s if self.in_seconds else float(point.epoch)
            last = at / point.epoch if before is None else at - before
            if Pause(level).is_reached(at, last):
                return count
            before = at
        return None

    def _rung_within(self, place: int) -> float | None:
        level = self.level(place)
        return level if self.in_seconds or level < self.epochs else None


def first_rung(search: Search) -> tuple[float, bool]:
    """The first rung, and whether it is in device-seconds."""
    if search.rung_s is not None:
        return search.rung_s, True
    return float(search.rung_epochs or 1), False


def next_segment(plan: Plan, trials: Sequence[Trial], left_s: float = math.inf) -> Trial | int | None:
    """What to run next: a trial with the `until` of its next segment, the number of a new trial, or None.

    None while nothing can start; if nothing runs either, the search is over.

    Args:
        plan: of the sweep.
        trials: all records.
        left_s: device-seconds that the search may still spend, without what is kept to finish it.
    """
    if left_s > 0:
        for trial in trials:
            if trial.status == "waiting":
                return trial
        begun = sum(one.replaces is None for one in trials)
        is_open = begun < plan.search.trials and not is_enough(plan, trials)
        if is_open and plan.search.scheduler == "pbt":  # a population grows up together
            return len(trials)
        found = SCHEDULERS[plan.search.scheduler](plan, trials)
        if found is not None:
            return found
        if is_open:
            return len(trials)
    if any(one.status == "running" for one in trials):
        return None
    best = leader(plan, trials)
    return replace(best, until=None) if best and best.status in ("paused", "waiting") else None


def leader(plan: Plan, trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best objective so far, finished or not."""
    if plan.search.cost:
        return next(iter(ranking(plan, trials)), None)
    known = [(plan.known(one).value, -one.number, one) for one in trials if one.status != "failed"]
    best = max(known, default=None, key=lambda row: row[:2])
    return best[2] if best and best[0] > -math.inf else None


def ranking(plan: Plan, trials: Sequence[Trial]) -> list[Trial]:
    """Trials that have an objective, the best first."""
    known = [(one, plan.known(one).value) for one in trials if one.status != "failed"]
    known = [(one, value) for one, value in known if value > -math.inf]
    return _ranked(plan, [one for one, _ in known], [value for _, value in known])


def best_of(plan: Plan, trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best objective among those that were trained to their end."""
    ended = [one for one in trials if one.status == "finished"]
    return max(ended, key=lambda one: (plan.known(one).value, -one.number), default=None)


def kept_s(plan: Plan, trials: Sequence[Trial], left_s: float = math.inf) -> float:
    """Device-seconds of the budget that are kept to finish the best trial and to race it; 0 while nothing is known.

    Args:
        plan: of the sweep.
        trials: all records of the search.
        left_s: device-seconds that are left of the budget; where they pay no race, nothing is kept for one.
    """
    best = leader(plan, trials) if plan.search.budget_s is not None else None
    if best is None or plan.search.budget_s is None:
        return 0.0
    finish = _finish_s(plan, best)
    if not plan.search.finalists:
        return finish
    smallest, share_s = race_s(plan, trials, 1), RACE_SHARE * plan.search.budget_s
    race = min(race_s(plan, trials, plan.search.finalists), max(share_s, smallest))
    is_raced = smallest < MOST_SHARE * plan.search.budget_s and finish + smallest <= left_s
    return finish + ROUNDING * race if is_raced else finish


def finalists(plan: Plan, trials: Sequence[Trial], count: int) -> list[Trial]:
    """The best trials, each set of values once, and none that is the experiment as written."""
    out: list[Trial] = []
    for one in ranking(plan, trials):
        if len(out) == count:
            break
        is_written = all(plan.as_written.get(key) == value for key, value in one.overrides.items())
        if one.overrides not in [other.overrides for other in out] and not (is_written and plan.as_written):
            out.append(one)
    return out


def race_s(plan: Plan, trials: Sequence[Trial], count: int) -> float:
    """Device-seconds of the first seeds of a race; the experiment as written counts as the dearest finalist."""
    prices = [price_s(plan, one) for one in finalists(plan, trials, count)]
    return FEWEST * (sum(prices) + max(prices)) if prices else 0.0


def least_budget_s(plan: Plan, trials: Sequence[Trial]) -> float:
    """Device-seconds of the whole sweep that would have room for the smallest race; 0 while nothing is known."""
    smallest, best = race_s(plan, trials, 1), leader(plan, trials)
    if best is None or not smallest:
        return 0.0
    spent = sum(one.device_s for one in trials)
    return max(smallest / MOST_SHARE, spent + _finish_s(plan, best) + ROUNDING * smallest)


def _finish_s(plan: Plan, trial: Trial) -> float:
    """Device-seconds that train a trial to its end."""
    rest = 1 - trial.epochs / plan.epochs
    return ROUNDING * price_s(plan, trial) * rest if trial.status != "finished" else 0.0


def price_s(plan: Plan, trial: Trial) -> float:
    """Device-seconds of a whole training like that of a trial, by what it took so far, with its starts."""
    if not trial.points:
        return 0.0
    trained_s = trial.points[-1].device_s
    return trained_s / trial.epochs * plan.epochs + max(0.0, trial.device_s - trained_s)


def is_enough(plan: Plan, trials: Sequence[Trial]) -> bool:
    """Whether twice as many trials are expected to gain less than `search.min_gain`.

    The next doubling is taken to gain no more than the last: the best of all trials less the expected best of a random
    half of them.
    """
    if not plan.search.min_gain:
        return False
    alive = [one for one in trials if one.status != "failed"]
    values = sorted(value for one in alive if (value := plan.known(one).value) > -math.inf)
    count = len(values)
    if count < GAIN_FROM:
        return False
    half = count // 2
    best, chance = 0.0, half / count  # that the best of all is in the half
    for place in range(count - 1, half - 2, -1):
        best += chance * values[place]
        chance *= (place - half + 1) / place if place else 0.0
    return values[-1] - best < plan.search.min_gain


def bracket(search: Search, number: int) -> int:
    """The place of a trial's first rung: 0, and with hyperband later ones for every few trials."""
    if search.scheduler != "hyperband":
        return 0
    sizes = [
        math.ceil(BRACKETS / (BRACKETS - place) * search.eta ** (BRACKETS - 1 - place)) for place in range(BRACKETS)
    ]
    at = number * 7919 % sum(sizes)  # brackets begin mixed, not one after the other
    return next(place for place in range(BRACKETS) if at < sum(sizes[: place + 1]))


def _promote(plan: Plan, trials: Sequence[Trial]) -> Trial | None:
    """The best paused trial among the best 1/eta of its bracket's rung, from the furthest rung on."""
    alive = [(one, bracket(plan.search, one.number), plan.known(one)) for one in trials if one.status != "failed"]
    waits = {(begins, len(known.at_rungs) - 1) for one, begins, known in alive if one.status == "paused"}
    for begins, at in sorted(waits, key=sum, reverse=True):
        here, values = list[Trial](), list[float]()
        for one, bracket_of, known in alive:
            reached = at < len(known.at_rungs)
            if bracket_of == begins and (reached or one.status == "finished"):
                here.append(one)
                # A trial that ended before this rung is compared by all that it has.
                values.append(known.at_rungs[at] if reached else known.value)
        for one in _ranked(plan, here, values)[: len(here) // plan.search.eta]:
            if one.status == "paused" and len(plan.known(one).at_rungs) == at + 1:
                return replace(one, until=plan.after(one))
    return None


def _above_median(plan: Plan, trials: Sequence[Trial]) -> Trial | None:
    """A paused trial that is no worse than the median of those that reached its rung."""
    alive = [(one, plan.known(one)) for one in trials if one.status != "failed"]
    medians = dict[int, float]()
    for one, known in alive:
        place = len(known.at_rungs) - 1
        if one.status != "paused":
            continue
        if place not in medians:
            values = [
                other.at_rungs[place] if place < len(other.at_rungs) else other.value
                for trial, other in alive
                if place < len(other.at_rungs) or trial.status == "finished"
            ]
            medians[place] = float(np.median(values)) if len(values) >= FEWEST else -math.inf
        if known.at_rungs[place] >= medians[place]:
            return replace(one, until=plan.after(one))
    return None


def _exploit(plan: Plan, trials: Sequence[Trial]) -> Trial | None:
    """What follows once a population is at a rung: children of the best quarter replace the worst, the others go on.

    Children come first: they begin with the checkpoints that their parents have at this rung.
    """
    replaced = {one.replaces for one in trials}
    members = [one for one in trials if one.status != "failed" and one.number not in replaced]
    waits = [one for one in members if one.status == "paused" and one.until is not None]
    rung = min((one.until for one in waits if one.until is not None), default=None)
    if rung is None or any(one.status == "running" and (one.until or math.inf) <= rung for one in members):
        return None
    counts = [
        (one, plan.until(one.points, rung))
        for one in trials
        if one.status != "failed" and (one.born is None or one.born < rung)
    ]
    peers = [
        (one, one.value(plan.sign, count)) for one, count in counts if count is not None or one.status == "finished"
    ]
    order = [one for one, _ in sorted(peers, key=lambda pair: (-pair[1], pair[0].number))]
    quarter = len(order) // 4
    here = [one for one in waits if one.until == rung]
    sources = [one for one in order[:quarter] if one in here]
    for loser in order[len(order) - quarter :] if sources else []:
        if loser in here:
            digest = hashlib.sha256(f"{len(trials)}|{loser.number}".encode()).digest()
            source = sources[digest[0] % len(sources)]
            return Trial(
                len(trials),
                source.overrides,
                until=plan.after(loser),
                parent=source.number,
                replaces=loser.number,
                born=rung,
                inherited=source.epochs,
            )
    return replace(here[0], until=plan.after(here[0]))


def _ranked(plan: Plan, trials: Sequence[Trial], values: Sequence[float]) -> list[Trial]:
    """The best first; with a cost, those that no other beats in both come before those that only these beat."""
    fronts = [0] * len(trials)
    if plan.search.cost:
        fronts = front_of([(one.cost if one.cost is not None else math.inf) for one in trials], values)
    rows = [
        (front, -value, one.number, at)
        for at, (one, value, front) in enumerate(zip(trials, values, fronts, strict=True))
    ]
    return [trials[at] for _, _, _, at in sorted(rows)]


def front_of(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """For each trial in which front it lies: 0 if no other is as good in cost (less) and value (more)."""
    left, out, front = set(range(len(costs))), [0] * len(costs), 0
    while left:
        best, here = -math.inf, list[int]()
        for at in sorted(left, key=lambda at: (costs[at], -values[at])):
            if values[at] > best or not here:
                here.append(at)
                best = values[at]
        for at in here:
            out[at] = front
        left -= {*here}
        front += 1
    return out


SCHEDULERS: dict[str, Callable[[Plan, Sequence[Trial]], Trial | None]] = {
    "asha": _promote,
    "hyperband": _promote,
    "median": _above_median,
    "pbt": _exploit,
    "none": lambda plan, trials: None,
}
