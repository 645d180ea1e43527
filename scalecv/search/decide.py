"""What a sweep does next under its budget: the search, then the race, or the search again where no race can be paid."""

import math
from collections.abc import Sequence

from scalecv.search.race import next_heat
from scalecv.search.schedule import Plan, kept_s, next_segment
from scalecv.search.trials import Trial

STOP_S, STOP_SHARE = 20.0, 0.05
"""Device-seconds that a training takes to stop, with a step and a checkpoint; and the share of the budget for all."""


def search_left_s(plan: Plan, trials: Sequence[Trial], race: Sequence[Trial], left_s: float, devices: int = 0) -> float:
    """Device-seconds that the search may still spend.

    Args:
        plan: of the sweep.
        trials: all records of the search.
        race: records of the race.
        left_s: device-seconds that are left of the budget.
        devices: that the search holds now, and gives back only once its trainings have stopped.
    """
    kept = kept_s(plan, trials, math.inf if race else left_s)
    to_stop = min(STOP_S * devices, STOP_SHARE * (plan.search.budget_s or 0.0)) if kept else 0.0
    return left_s - kept - to_stop


def next_training(
    plan: Plan, trials: Sequence[Trial], race: Sequence[Trial], left_s: float, is_closed: bool, devices: int = 0
) -> tuple[Trial | int | None, bool]:
    """What runs next, and whether the search is closed after that.

    Args:
        plan: of the sweep.
        trials: all records of the search.
        race: records of the race.
        left_s: device-seconds that are left of the budget.
        is_closed: what is left is for the best trial and the race.
        devices: that the search holds now.
    Returns: a trial or a training of the race to go on with, the number of a new trial, or None while nothing can
        start and where all is done; and `is_closed`, false again where what is left pays no race.
    """
    explore_s = search_left_s(plan, trials, race, left_s, devices)
    found = next_segment(plan, trials, 0.0 if is_closed else explore_s)
    if found is not None or any(one.status == "running" for one in trials):
        return found, is_closed
    heat = next_heat(plan, trials, race, left_s)
    if heat is None and is_closed and not race and explore_s > 0:
        return next_training(plan, trials, race, left_s, False, devices)
    return heat, is_closed
