"""Whether trials fail for a reason that the others have, too."""

import re
from collections.abc import Sequence

from scalecv.search.trials import Trial

ALIKE = 3
"""Trials that fail alike end a sweep, where no other one has got further than they."""


def hopeless(trials: Sequence[Trial], sweep: str) -> str | None:
    """Why a sweep should end, for its other trials would fail as well; None where it should go on.

    Args:
        trials: records of the search.
        sweep: its name.
    """
    failed = [one for one in trials if one.status == "failed"]
    if len(failed) < ALIKE or len({_kind(one, sweep) for one in failed}) > 1:
        return None
    furthest = max(one.epochs for one in failed)
    others = [one for one in trials if one.status not in ("failed", "running")]
    if any(one.status == "finished" or one.epochs > furthest for one in others):
        return None
    return f"{len(failed)} trials failed alike, and none got any further: {failed[-1].cause}"


def _kind(trial: Trial, sweep: str) -> str:
    """Why a trial failed, without what differs from trial to trial: its folder, numbers and ids."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", trial.cause.replace(trial.run_name(sweep), ""))
