"""What MLflow holds of a run, in one record: what went in, what came out, and the curves between."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalecv.artifacts import lookup, mlflow_client
from scalecv.config import parse_yaml

CURVES = ("train/batch_loss", "train/loss", "val/loss")
"""Curves that are compared point by point."""


@dataclass(frozen=True)
class Record:
    """A run as it was recorded."""

    run_id: str
    name: str
    status: str
    """As MLflow says it: FINISHED, RUNNING, FAILED or KILLED."""
    experiment: dict[str, Any]
    """The resolved experiment, nested."""
    params: dict[str, str]
    """Keys of the experiment as they were when the run began; a later command may have raised some."""
    data: dict[str, str]
    """uri, version and fingerprint (its first 36 digits) of the training data."""
    tags: dict[str, str]
    metrics: dict[str, float]
    """The newest value of each metric."""
    curves: dict[str, dict[int, float]]
    """Of each of CURVES, the value by update."""

    @property
    def micro_batch(self) -> int | None:
        """Images at a time that train.micro_batch=auto found; None where it was not looked for."""
        found = self.metrics.get("system/micro_batch")
        return None if found is None else int(found)


def read_record(run: str, experiment: str = "scalecv", uri: str | None = None) -> Record:
    """The record of `runs:/ID`, an ID, or the newest run of a name.

    Args:
        run: what the user wrote.
        experiment: name of the MLflow experiment that a run's name is looked up in.
        uri: tracking URI; None takes the one in use.
    Raises: UserError: no such run, or one that scalecv did not train.
    """
    run_id = lookup.find_run(run, experiment, uri)
    tree = parse_yaml(lookup.resolved_experiment(run_id, uri), f"{lookup.EXPERIMENT_FILE} of run {run_id}")
    client = mlflow_client.client(mlflow_client.tracking_uri(uri))
    found = client.get_run(run_id)
    return Record(
        run_id=run_id,
        name=found.info.run_name,
        status=found.info.status,
        experiment=tree,
        params=dict(found.data.params),
        data=_data(found),
        tags=dict(found.data.tags),
        metrics=dict(found.data.metrics),
        curves={key: _curve(client, run_id, key) for key in CURVES},
    )


def tell_tags(run_id: str, tags: Mapping[str, str], uri: str | None = None) -> None:
    """Set tags of a run that is there already."""
    client = mlflow_client.client(mlflow_client.tracking_uri(uri))
    for key, value in tags.items():
        client.set_tag(run_id, key, value)


def _curve(client: Any, run_id: str, key: str) -> dict[int, float]:
    points = sorted(client.get_metric_history(run_id, key), key=lambda point: (point.step, point.timestamp))
    return {point.step: point.value for point in points}


def _data(run: Any) -> dict[str, str]:
    """The dataset that was logged for training; empty where none was."""
    for one in run.inputs.dataset_inputs:
        if any(tag.key == "mlflow.data.context" and tag.value == "train" for tag in one.tags):
            source = json.loads(one.dataset.source)
            return {
                "fingerprint": str(one.dataset.digest),
                "version": str(source.get("version")),
                "uri": str(source.get("uri")),
            }
    return {}
