"""A stretch of one trial: its run goes on from its last checkpoint, until its next rung or its end."""

import time
from typing import Any

from scalecv.config import Experiment
from scalecv.errors import Interrupted, ScalecvError


def run_segment(
    experiment: Experiment, metric: str, until: int | None, tags: dict[str, str], code_dirs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train on, and say how it ended: the fields of a `Trial` that changed, as plain values.

    Args:
        experiment: of the trial.
        metric: the objective.
        until: epochs after which the run pauses; None trains to the end.
        tags: of the trial's MLflow run.
        code_dirs: folders with the user's own networks.
    """
    from scalecv.train import checkpoint, runs
    from scalecv.train.run import train

    told: dict[str, Any] = {"status": "paused", "cause": "", "metrics": {}}

    def hear(event: dict[str, Any]) -> None:
        if event["kind"] == "recorded" and event["run_id"]:
            told["run_id"] = event["run_id"]

    began = time.monotonic()
    try:
        result = train(experiment, code_dirs=code_dirs, tell=hear, until=until, tags=tags)
        told |= {"status": "finished", "bundle": result.bundle, "weights_hash": result.weights_hash}
        told |= {"run_id": result.run_id, "metrics": result.metrics}
    except Interrupted:
        pass
    except ScalecvError as error:
        told |= {"status": "failed", "cause": str(error).splitlines()[0]}
    except Exception as error:  # a bug in a trial's network is that trial's, and leaves the others running
        said = str(error).strip().splitlines() or [""]
        told |= {"status": "failed", "cause": f"{type(error).__name__}: {said[0]}"}
    took = time.monotonic() - began
    # From the checkpoint and not from what was told: a driver that was killed has not heard all of it.
    place = runs.newest(experiment)
    epochs = checkpoint.history(place) if place else []
    if told["status"] == "paused" and (until is None or len(epochs) < until):
        told["status"] = "waiting"  # asked to stop on the way
    told["metrics"] = {**(epochs[-1] if epochs else {}), **told["metrics"]}
    points = [{"epoch": int(one["epoch"]), "value": one[metric]} for one in epochs if metric in one]
    return {**told, "device_s": took * max(1, experiment.scale.workers), "points": points}
