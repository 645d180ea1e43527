"""The door to Ray Tune: it runs segments on the cluster's free CPUs and GPUs, in processes that stay warm."""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from scalecv.train.signals import in_thread

QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
FINISHED: str = Searcher.FINISHED

Suggest = Callable[[str], dict[str, Any] | str | None]
"""Tune's name of a segment -> what it is given; None: nothing now; FINISHED: nothing is left."""
Ended = Callable[[str, dict[str, Any] | None], None]
"""(Tune's name of a segment, what it returned); None where its processes died."""
Died = Callable[[str], None]
"""Tune's name of a segment whose process died and is started again."""


class _Asks(Searcher):  # type: ignore[misc]  # ray is untyped here
    """Passes Tune's questions on."""

    def __init__(self, suggest: Suggest, ended: Ended) -> None:
        super().__init__(metric=None, mode="max")
        self._suggest, self._ended = suggest, ended

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        return self._suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        said = None if error or not result else result.get("outcome")
        self._ended(trial_id, None if said is None else json.loads(said))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its searcher down; ours is asked by this process alone

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds all."""


class _Hears(tune.Callback):  # type: ignore[misc]  # ray is untyped here
    """Passes on what Tune does not tell its searcher."""

    def __init__(self, died: Died) -> None:
        self._died = died

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._died(trial.trial_id)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above


def run(
    suggest: Suggest,
    ended: Ended,
    died: Died,
    folder: str,
    segment: Callable[[dict[str, Any]], dict[str, Any]],
    resources: dict[str, float],
    most: int,
    deaths: int,
) -> None:
    """Run segments until `suggest` says FINISHED.

    Args:
        suggest: what the next one is given: few, flat values, for Tune copies and flattens what is nested.
        ended: told how it ended.
        died: told of a process that died, before it is started again.
        folder: for Tune's own files.
        segment: runs in a process of the cluster.
        resources: that one takes, as {"CPU": 1}.
        most: segments at a time.
        deaths: of a segment's process after each of which it is started again.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)

    def trainable(config: dict[str, Any]) -> None:
        tune.report({"outcome": json.dumps(segment(config))})  # Tune flattens what is nested

    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=_Asks(suggest, ended), num_samples=-1, max_concurrent_trials=most, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=folder,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=deaths),
            callbacks=[_Hears(died)],
        ),
    )
    in_thread(tuner.fit, "ray-tune")  # signals are ours: a sweep pauses its runs before it ends
