"""A stretch of one trial: its run goes on from its last checkpoint, until its next rung or its end."""

import time
from typing import Any

from scalecv.config import Experiment
from scalecv.errors import Interrupted, ScalecvError
from scalecv.train.job import Pause, epoch_s


def run_segment(
    experiment: Experiment,
    metric: str,
    until: Pause | None,
    tags: dict[str, str],
    code_dirs: tuple[str, ...] = (),
    *,
    cost: str | None = None,
) -> dict[str, Any]:
    """Train on, and say how it ended: the fields of a `Trial` that changed, as plain values.

    Args:
        experiment: of the trial.
        metric: the objective.
        until: where the run pauses; None trains to the end.
        tags: of the trial's MLflow run.
        code_dirs: folders with the user's own networks.
        cost: name of a second objective that is to be measured.
    """
    from scalecv.train import checkpoint, runs
    from scalecv.train.memory import give_back
    from scalecv.train.network import cost_of
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
    give_back()
    # From the checkpoint and not from what was told: a driver that was killed has not heard all of it.
    devices = max(1, experiment.scale.workers)
    try:
        place = runs.newest(experiment)
        epochs = checkpoint.history(place) if place else []
    except (OSError, ScalecvError) as error:  # told with its cause: raised here it would look like a process that died
        cause = told["cause"] or f"its checkpoint cannot be read: {str(error).splitlines()[0]}"
        return {**told, "status": "failed", "cause": cause, "device_s": (time.monotonic() - began) * devices}
    if told["status"] == "paused" and not (until and until.comes(epochs, devices)):
        told["status"] = "waiting"  # asked to stop on the way
    if cost and epochs and told["status"] != "failed":
        try:
            told["cost"] = cost_of(experiment, cost)
        except Exception as error:  # a network of the user's may refuse to be counted; its trial does not fail for it
            told["cause"] = f"{cost} is not known: {str(error).splitlines()[0] if str(error) else error!r}"
    told["metrics"] = {**(epochs[-1] if epochs else {}), **told["metrics"]}
    points, spent = list[dict[str, float]](), 0.0
    for one in epochs:
        spent += epoch_s(one) * devices
        if metric in one:
            points.append({"epoch": int(one["epoch"]), "value": one[metric], "device_s": spent})
    return {**told, "device_s": (time.monotonic() - began) * devices, "points": points}
