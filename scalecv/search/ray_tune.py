"""The door to Ray Tune: it runs segments on the cluster's free CPUs, in processes that stay warm."""

import json
import logging
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.search import Searcher


class _Asks(Searcher):  # type: ignore[misc]  # ray is untyped here
    """Passes Tune's questions on."""

    def __init__(
        self,
        suggest: Callable[[str], dict[str, Any] | str | None],
        ended: Callable[[str, dict[str, Any] | None], None],
    ) -> None:
        super().__init__(metric=None, mode="max")
        self._suggest, self._ended = suggest, ended

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        found = self._suggest(trial_id)
        return Searcher.FINISHED if found == "finished" else found

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        said = None if error or not result else result.get("outcome")
        self._ended(trial_id, None if said is None else json.loads(said))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its searcher down; ours is asked by this process alone

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds all."""


def run(
    suggest: Callable[[str], dict[str, Any] | str | None],
    ended: Callable[[str, dict[str, Any] | None], None],
    folder: str,
    segment: Callable[[dict[str, Any]], dict[str, Any]],
    cpus: float,
    concurrent: int | None,
) -> None:
    """Run segments until `suggest` says "finished", or Ctrl-C.

    Args:
        suggest: what the next one is given; None: not now.
        ended: told what `segment` returned, or None where its process died.
        folder: for Tune's own files.
        segment: runs in a process of the cluster.
        cpus: that one takes.
        concurrent: most at a time; None: as many as there is room for.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)

    def trainable(config: dict[str, Any]) -> None:
        tune.report({"outcome": json.dumps(segment(config))})  # Tune flattens what is nested

    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": cpus}),
        tune_config=tune.TuneConfig(
            search_alg=_Asks(suggest, ended),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0),
    )
    tuner.fit()
