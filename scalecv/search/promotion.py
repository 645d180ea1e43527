"""What runs next: successive halving that pauses trials at rungs and promotes the best of each.

A function of the records alone, so a driver that was killed and started again decides as it would have.
"""

from collections.abc import Sequence
from dataclasses import replace

from scalecv.config.search import Search
from scalecv.search.trials import Trial


def rungs(search: Search, epochs: int) -> list[int]:
    """Epochs at which trials pause, ascending; the end of training is no rung."""
    out: list[int] = []
    at = search.rung_epochs
    while search.scheduler == "promote" and at < epochs:
        out.append(at)
        at *= search.eta
    return out


def next_segment(trials: Sequence[Trial], search: Search, epochs: int, sign: float) -> Trial | int | None:
    """What to run next: a trial with the `until` of its next segment, the number of a new trial, or None.

    None while nothing can start; if nothing runs either, the sweep is over.

    Args:
        trials: all records.
        search: what was asked for.
        epochs: of a whole training.
        sign: 1 where a larger objective is better, else -1.
    """
    for trial in trials:
        if trial.status == "waiting":
            return trial
    spent = sum(trial.device_s for trial in trials)
    if search.budget_s is not None and spent >= search.budget_s:
        return None
    levels = rungs(search, epochs)
    for place in range(len(levels) - 1, -1, -1):
        here = [one for one in trials if one.status != "failed" and one.epochs >= levels[place]]
        ranked = sorted(here, key=lambda one: (-one.value(levels[place], sign), one.number))
        for one in ranked[: len(here) // search.eta]:
            if one.status == "paused" and one.epochs < (*levels, epochs)[place + 1]:
                return replace(one, until=(*levels, None)[place + 1])
    if len(trials) < search.trials:
        return len(trials)
    return None if any(one.status in ("running", "finished") for one in trials) else _furthest(trials, sign)


def first_rung(search: Search, epochs: int) -> int | None:
    """Where a new trial pauses first."""
    return next(iter(rungs(search, epochs)), None)


def best_of(trials: Sequence[Trial], epochs: int, sign: float) -> Trial | None:
    """The trial with the best objective among those that were trained to their end."""
    ended = [one for one in trials if one.status == "finished"]
    return max(ended, key=lambda one: (one.value(epochs, sign), -one.number), default=None)


def _furthest(trials: Sequence[Trial], sign: float) -> Trial | None:
    """The best of the trials that came furthest, to be trained to its end: a sweep ends with a model."""
    paused = [one for one in trials if one.status == "paused"]
    best = max(paused, key=lambda one: (one.epochs, one.value(one.epochs, sign), -one.number), default=None)
    return None if best is None else replace(best, until=None)
