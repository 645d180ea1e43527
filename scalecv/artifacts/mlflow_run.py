"""One MLflow run: found or created by its key, and told the events of a spool, each of them repeatable."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalecv import redact, storage
from scalecv.artifacts import mlflow_client
from scalecv.artifacts.spool import Event

RUN_KEY = "scalecv.run_key"
PARENT_KEY = "scalecv.parent_key"
"""Key of the run above this one, such as a sweep's: it may be told to MLflow later than this one."""
MOST_METRICS = 1000
MOST_PAIRS = 100
MOST_TEXT = 4000
REFUSED = ("INVALID_PARAMETER_VALUE", "INVALID_STATE")
"""What no later try changes. A proxy or a login that says no (400, 401, 403) may say yes tomorrow: points wait."""


class Refused(Exception):
    """MLflow will never take this event; the others go on."""


class Gone(Exception):
    """The run is not there any more."""


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    step: int
    value: float
    time_ms: int


@dataclass(frozen=True)
class Run:
    """An MLflow run that is being told."""

    client: Any
    run_id: str
    experiment_id: str


def open_run(uri: str, experiment: str, name: str, key: str, tags: Mapping[str, str], start_ms: int | None) -> Run:
    """The run with the tag `scalecv.run_key` = `key`, or a new one; never a second one.

    Raises: LookupError: the run above it, which the tag `scalecv.parent_key` names, is not there yet.
    """
    client = mlflow_client.client(uri)
    experiment_id = _experiment(client, uri, experiment)
    tags = _below(client, experiment_id, tags)
    if run := _of_key(client, experiment_id, key):
        changed = {k: v for k, v in tags.items() if run.data.tags.get(k) != v}
        if changed:
            client.log_batch(run.info.run_id, tags=_tags(changed))
        return Run(client, run.info.run_id, experiment_id)
    every = {t.key: t.value for t in _tags({**tags, RUN_KEY: _quoted(key)})}
    made = client.create_run(experiment_id, start_time=start_ms, tags=every, run_name=name)
    return Run(client, made.info.run_id, experiment_id)


def _below(client: Any, experiment_id: str, tags: Mapping[str, str]) -> Mapping[str, str]:
    """The tags, with the ID of the run above where there is one."""
    parent = tags.get(PARENT_KEY)
    if parent is None:
        return tags
    above = _of_key(client, experiment_id, parent)
    if above is None:
        raise LookupError(f"the run above it, {RUN_KEY}={parent}, is not there yet")
    return {**tags, "mlflow.parentRunId": above.info.run_id}


def _of_key(client: Any, experiment_id: str, key: str) -> Any:
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{_quoted(key)}'", max_results=1)
    return found[0] if found else None


def _quoted(key: str) -> str:
    return key.replace("'", "")


def newest(run: Run) -> dict[str, int]:
    """Step of each metric's newest point on the server."""
    with _spoken():
        data = run.client.get_run(run.run_id).data.to_proto()
    return {m.key: m.step for m in data.metrics}


def steps(run: Run, key: str) -> set[int]:
    """All steps of a metric on the server."""
    with _spoken():
        return {point.step for point in run.client.get_metric_history(run.run_id, key)}


def reopen(run: Run) -> None:
    """Set a finished run to running again."""
    with _spoken():
        if run.client.get_run(run.run_id).info.status != "RUNNING":
            run.client.update_run(run.run_id, status="RUNNING")


def log_points(run: Run, points: list[Point]) -> None:
    """Send at most 1000 values in one request; the same values again change nothing (primary key of the SQL store).

    Raises: Refused: MLflow finds them invalid.
    """
    from mlflow.entities import Metric

    with _spoken():
        run.client.log_batch(run.run_id, metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in points])


def log_event(run: Run, event: Event) -> None:
    """Tell the run one event that is not metrics; told twice it is there once.

    Raises: Refused: the event cannot be told, whatever is tried.
    """
    tell = TELL.get(event.get("kind", ""))
    if tell is None:
        return
    with _spoken():
        tell(run, event)


def metric_key(name: str) -> str:
    """The name with characters that MLflow refuses replaced by '_'."""
    return re.sub(r"[^\w/.\- :]", "_", name).strip("/")[:250] or "_"


def _experiment(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, mlflow_client.artifact_location(uri, name)))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process was first
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise Refused(f"the MLflow experiment '{name}' was deleted: restore it there, or set track.experiment")
    return str(found.experiment_id)


def _params(run: Run, event: Event) -> None:
    from mlflow.entities import Param

    wanted = {metric_key(k): _text(v) for k, v in event["params"].items()}
    there = run.client.get_run(run.run_id).data.params
    new = [Param(k, v) for k, v in wanted.items() if k not in there]
    for at in range(0, len(new), MOST_PAIRS):
        run.client.log_batch(run.run_id, params=new[at : at + MOST_PAIRS])
    # A param is written once in MLflow; what was raised since, such as train.epochs, is told by a tag.
    later = {f"scalecv.now.{k}": v for k, v in wanted.items() if there.get(k, v) != v}
    if later:
        run.client.log_batch(run.run_id, tags=_tags(later))


def _log_tags(run: Run, event: Event) -> None:
    tags = _tags(event["tags"])
    for at in range(0, len(tags), MOST_PAIRS):
        run.client.log_batch(run.run_id, tags=tags[at : at + MOST_PAIRS])


def _artifact(run: Run, event: Event) -> None:
    with _local(event["uri"]) as path:
        run.client.log_artifact(run.run_id, path, event.get("folder") or None)


def _image(run: Run, event: Event) -> None:
    """Files named as `MlflowClient.log_image` names them, but the same each time, so that a repeat adds none."""
    from PIL import Image

    key = re.sub(r"[^\w\-. ]", "~", event["key"])
    name = f"{key}+step+{event['step']}+timestamp+{event['time_ms']}+{event['step']:032x}"
    with _local(event["uri"]) as path, tempfile.TemporaryDirectory() as folder:
        full, small = os.path.join(folder, f"{name}.png"), os.path.join(folder, f"{name}+compressed.webp")
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError) as error:
            raise Refused(f"{event['uri']} is no picture: {error}") from None
        image.save(full)
        image.resize(_fitted(image.size)).save(small)
        for file in (full, small):
            run.client.log_artifact(run.run_id, file, "images")
    run.client.set_tag(run.run_id, "mlflow.loggedImages", "True")


def _fitted(size: tuple[int, int], most_px: int = 256) -> tuple[int, int]:
    scale = min(1.0, most_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _log_text(run: Run, event: Event) -> None:
    run.client.log_text(run.run_id, event["text"], event["file"])


def _dataset(run: Run, event: Event) -> None:
    import json

    from mlflow.entities import Dataset, DatasetInput, InputTag

    uri = storage.without_secrets(event["uri"])
    about = {"version": event.get("version"), **event.get("profile", {})}
    dataset = Dataset(
        name=event["name"][:500],
        digest=str(event["digest"])[:36],  # the longest that MLflow takes
        source_type="scalecv",
        source=json.dumps({"uri": uri, "version": event.get("version")}),
        profile=json.dumps(about),
    )
    tags = [InputTag("mlflow.data.context", event.get("context", "train"))]
    run.client.log_inputs(run.run_id, [DatasetInput(dataset, tags)])


def _model(run: Run, event: Event) -> None:
    from scalecv.artifacts import mlflow_model

    uri = storage.without_secrets(event["uri"])
    there = run.client.search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}'")
    known = [model for model in there if model.tags.get("scalecv.bundle") == uri]
    if any(model.status == "READY" for model in known):
        return
    with _local_folder(event["uri"]) as folder:
        # `log_model` alone would put it into the default experiment; one that was left half-way is filled again.
        model = (
            known[0]
            if known
            else run.client.create_logged_model(
                run.experiment_id, event.get("name", "model"), run.run_id, {"scalecv.bundle": uri}
            )
        )
        mlflow_model.log_bundle(run.client, folder, model.model_id, run.run_id)


def _end(run: Run, event: Event) -> None:
    began = run.client.get_run(run.run_id).info.start_time  # a clock that was set back makes no negative duration
    run.client.set_terminated(run.run_id, event.get("status", "FINISHED"), max(event["time_ms"], began or 0))


TELL = {
    "params": _params,
    "tags": _log_tags,
    "artifact": _artifact,
    "image": _image,
    "text": _log_text,
    "dataset": _dataset,
    "model": _model,
    "end": _end,
}


def _tags(tags: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(metric_key(k), _text(v)) for k, v in tags.items()]


def _text(value: Any) -> str:
    """Text of a param or tag: as YAML would write it, without secrets of URIs, short enough for MLflow."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"(\w[\w+.-]*://[^\s?]*)\?\S*", r"\1", redact.clean(str(value)))[:MOST_TEXT]


@contextmanager
def _local(uri: str) -> Iterator[str]:
    """A local file with the bytes at a URI, under its own name."""
    if storage.is_local(uri):
        path = storage.absolute(uri)
        if not os.path.isfile(path):
            raise Refused(f"{path} is not there any more")
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, uri.rpartition("/")[2])
        Path(path).write_bytes(storage.get(uri))
        yield path


@contextmanager
def _local_folder(uri: str) -> Iterator[str]:
    """A local folder with the files directly below a URI."""
    if storage.is_local(uri):
        yield storage.absolute(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.list_names(uri):
            Path(folder, name).write_bytes(storage.get(storage.join(uri, name)))
        yield folder


@contextmanager
def _spoken() -> Iterator[None]:
    """MLflow's errors as ours: `Refused`, `Gone`, or as they are, which means that trying again makes sense."""
    from mlflow.exceptions import MlflowException

    from scalecv.errors import UserError

    try:
        yield
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" and "Run" in str(error):
            raise Gone(str(error)) from None
        if error.error_code in REFUSED and "'active' state" not in str(error):
            raise Refused(f"MLflow refuses it: {str(error).splitlines()[0][:300]}") from None
        raise
    except (FileNotFoundError, UserError, KeyError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from None
