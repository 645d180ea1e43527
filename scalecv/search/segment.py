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
        until: epochs after which the run saves and pauses; None trains to the end.
        tags: of the trial's MLflow run.
        code_dirs: folders with the user's own networks.
    """
    from scalecv.train.run import train

    points: list[dict[str, Any]] = []
    last: dict[str, float] = {}

    def hear(event: dict[str, Any]) -> bool:
        if event.get("is_epoch_end"):
            last.update(event["metrics"])
            points.append({"epoch": event["epoch"], "value": event["metrics"].get(metric)})
            return until is not None and event["epoch"] >= until
        return False

    began = time.monotonic()
    told: dict[str, Any] = {"status": "paused", "cause": ""}
    try:
        result = train(experiment, code_dirs=code_dirs, pause=hear, tags=tags)
        told = {"status": "finished", "cause": "", "run_id": result.run_id, "bundle": result.bundle}
        told["weights_hash"] = result.weights_hash
        last.update(result.metrics)
    except Interrupted:
        pass
    except ScalecvError as error:
        told = {"status": "failed", "cause": str(error).splitlines()[0]}
    except Exception as error:  # a bug in a trial's network is that trial's, and leaves the others running
        said = str(error).strip().splitlines() or [""]
        told = {"status": "failed", "cause": f"{type(error).__name__}: {said[0]}"}
    devices = max(1, experiment.scale.workers)
    took = (time.monotonic() - began) * devices
    known = [point for point in points if point["value"] is not None]
    return {**told, "device_s": took, "points": known, "metrics": dict(last)}
