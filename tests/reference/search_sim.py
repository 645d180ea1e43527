"""Sweeps on simulated learning curves: the product's own decisions, on a clock that costs nothing.

A configuration has a quality it tends to, a speed at which it gets there, and seconds that one of its epochs takes;
large networks are slower and, on average, a little better. Numbers of curves come from a generator alone.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scalecv.config.search import Search
from scalecv.search.decide import next_training, search_left_s
from scalecv.search.race import standing_of
from scalecv.search.report import verdict
from scalecv.search.schedule import Plan, first_rung, leader
from scalecv.search.trials import AS_WRITTEN, Point, Trial


@dataclass(frozen=True)
class Config:
    """A configuration as its learning curves."""

    quality: float
    speed: float
    epoch_s: float
    pace: float = 1.0
    """How many epochs of a small network one of its epochs is worth."""

    def curve(self, epochs: int, noise: float, seed_noise: float, rng: np.random.Generator) -> np.ndarray:
        """Objective after each epoch of one training: `noise` differs from epoch to epoch, `seed_noise` stays."""
        at = self.pace * np.arange(1, epochs + 1)
        tends = self.quality - 0.5 * at**-self.speed + 0.5 * at[-1] ** -self.speed  # quality is that of the end
        return tends + rng.normal(0, seed_noise) + rng.normal(0, noise, epochs)


@dataclass
class World:
    """What the simulated trainings are drawn from."""

    config: Callable[[int], Config]
    epochs: int
    noise: float
    seed_noise: float
    seed: int

    def curve(self, number: int, seed: int | None) -> np.ndarray:
        """Of a trial (or AS_WRITTEN) and a seed of the race; None is that of the search."""
        words = [self.seed, number + 1, 0 if seed is None else seed + 1]
        return self.config(number).curve(self.epochs, self.noise, self.seed_noise, np.random.default_rng(words))


def simulate(search: Search, world: World, workers: int = 2) -> tuple[Plan, list[Trial], list[Trial], float]:
    """Run a sweep. Returns: its plan, the records of search and race, and the seconds that it took."""
    plan = Plan(search, world.epochs, 1.0, *first_rung(search))
    trials: list[Trial] = []
    race: list[Trial] = []
    events: list[tuple[float, int, Trial, Trial]] = []
    now, count, closing = 0.0, 0, False

    def left() -> float:
        live = sum(now - _began(end, trial, more) for end, _, trial, more in events)
        return (search.budget_s or math.inf) - sum(one.device_s for one in [*trials, *race]) - live

    while True:
        while len(events) < workers and left() > 0.01 * (search.budget_s or 0.0):
            closing = closing or search_left_s(plan, trials, race, left()) <= 0
            found, closing = next_training(plan, trials, race, left(), closing)
            if found is None:
                break
            trial = Trial(found, {}, until=plan.first(found)) if isinstance(found, int) else found
            _keep(trials if trial.entrant is None else race, replace(trial, status="running"))
            more, count = _trained(plan, world, trial), count + 1
            heapq.heappush(events, (now + more.device_s - trial.device_s, count, trial, more))
        if not events:
            return plan, trials, race, now
        searching = not closing and any(trial.entrant is None for _, _, trial, _ in events)
        explore = search_left_s(plan, trials, race, left()) if searching else math.inf
        until = now + max(0.0, min(left(), explore)) / len(events)
        if until < events[0][0]:  # told to stop, all of them or those that are not the best
            now = until
            closing, best = True, leader(plan, trials) if left() > 1 else None
            goes_on = [one for one in events if best and (one[2].entrant is not None or one[2].number == best.number)]
            for event in events:
                if event not in goes_on:
                    _keep(trials if event[2].entrant is None else race, _stopped(now, *event))
            events = goes_on
            heapq.heapify(events)
            continue
        now, _, _, trial = heapq.heappop(events)
        _keep(trials if trial.entrant is None else race, trial)


def _began(end: float, trial: Trial, more: Trial) -> float:
    return end - more.device_s + trial.device_s


def _stopped(now: float, end: float, _: int, trial: Trial, more: Trial) -> Trial:
    """A trial that was told to stop in the middle of its segment; its epochs that ended count."""
    device_s = trial.device_s + now - _began(end, trial, more)
    points = tuple(point for point in more.points if point.device_s <= device_s)
    return replace(trial, status="waiting", points=points, device_s=device_s)


def _keep(records: list[Trial], trial: Trial) -> None:
    records[trial.number : trial.number + 1] = [trial]


def _trained(plan: Plan, world: World, trial: Trial) -> Trial:
    """A trial after its segment."""
    number = trial.number if trial.entrant is None else trial.entrant
    curve, epoch_s = world.curve(number, trial.seed), world.config(number).epoch_s
    points = [Point(epoch, float(value), epoch * epoch_s) for epoch, value in enumerate(curve, 1)]
    count = None if trial.until is None else plan.until(points, trial.until)
    if count is not None:
        count = max(count, trial.epochs + 1)
    if count is None or count >= len(points):
        return replace(trial, status="finished", points=tuple(points), device_s=points[-1].device_s)
    return replace(trial, status="paused", points=tuple(points[:count]), device_s=points[count - 1].device_s)


def spread(seed: int, arches: int = 5, gain: float = 0.0) -> Callable[[int], Config]:
    """Configurations of several architectures: a few seconds to a minute an epoch.

    Args:
        gain: what an epoch of a network that takes k times as long is worth: k**gain epochs of the small one.
    """
    rng = np.random.default_rng([seed, 0xA])
    slow = np.exp(rng.uniform(math.log(3), math.log(60), arches))
    good = 0.70 + 0.02 * np.log(slow / 3) / math.log(20) + rng.normal(0, 0.01, arches)

    def config(number: int) -> Config:
        one = np.random.default_rng([seed, number + 1, 0xB])
        arch = int(one.integers(arches))
        loss = abs(one.normal(0, 0.06))  # of a learning rate and loss weights that are not the best
        pace = (slow[arch] / slow.min()) ** gain
        return Config(float(good[arch] - loss), float(one.uniform(0.6, 1.4)), float(slow[arch]), float(pace))

    return config


def alike(quality: float = 0.7, planted: float = 0.0, best: int = 3) -> Callable[[int], Config]:
    """Configurations that are all the same, but for one that is better by `planted`."""
    return lambda number: Config(quality + (planted if number == best else 0.0), 1.0, 10.0)


def told(plan: Plan, trials: Sequence[Trial], race: Sequence[Trial]) -> tuple[int | None, bool, int]:
    """What the race says: who is better than the experiment as written, whether anything is told apart, its seeds."""
    found = standing_of(plan, trials, race, 0.0)
    said = verdict(found, "quality", None, plan.search)
    return said.winner, any(pair.is_told_apart for pair in found.pairs), found.seeds


__all__ = ["AS_WRITTEN", "Config", "World", "alike", "simulate", "spread", "told"]
