"""`runs:/ID` and `models:/NAME@ALIAS` as the bundle and the experiment they stand for."""

import os
import re
from pathlib import Path
from typing import Any

from scalecv import storage
from scalecv.artifacts import mlflow_client
from scalecv.errors import StorageDenied, StorageError, UserError, nearest

EXPERIMENT_FILE = "experiment.yaml"
BUNDLE_TAG = "scalecv.bundle"


def is_reference(model: str) -> bool:
    """Whether a word names something in MLflow rather than a place."""
    return model.startswith(("runs:/", "models:/"))


def lookup(model: str, uri: str | None = None) -> str:
    """Place of the bundle of `runs:/ID`, `models:/NAME@ALIAS`, `models:/NAME/VERSION`; any other word as it is.

    The place where training wrote the bundle is preferred; where that is gone, MLflow's copy is fetched.

    Args:
        model: what the user wrote.
        uri: tracking URI; None takes the one in use.
    Raises: UserError: no such run or model, or one without a bundle.
    """
    if not is_reference(model):
        return model
    client = mlflow_client.client(_reachable(uri))
    found = _of_run(client, model) if model.startswith("runs:/") else _of_name(client, model)
    place = str(found.tags.get(BUNDLE_TAG, ""))
    if place and _is_bundle(place):
        return place
    return _fetched(found, model)


def resolved_experiment(run: str, uri: str | None = None) -> str:
    """Text of the resolved experiment of a run, given as ID or `runs:/ID`.

    Raises: UserError: no such run, or one that scalecv did not write.
    """
    client = mlflow_client.client(_reachable(uri))
    run_id = _run_id(run)
    _run(client, run_id)
    from mlflow.artifacts import load_text
    from mlflow.exceptions import MlflowException

    try:
        return str(load_text(f"runs:/{run_id}/{EXPERIMENT_FILE}"))
    except (MlflowException, OSError):
        raise UserError(f"run {run_id} has no {EXPERIMENT_FILE}: it was not made by `scalecv train`") from None


def find_run(run: str, experiment: str, uri: str | None = None) -> str:
    """ID of `runs:/ID`, of an ID of 32 digits, or of the newest run of a name in an MLflow experiment.

    Raises: UserError: no such run or experiment, with the nearest name that is there.
    """
    client = mlflow_client.client(_reachable(uri))
    if run.startswith("runs:/") or re.fullmatch(r"[0-9a-f]{32}", run):
        run_id = _run_id(run)
        _run(client, run_id)
        return run_id
    where = f"the MLflow experiment '{experiment}'"
    there = client.get_experiment_by_name(experiment)
    if there is None:
        names = [one.name for one in client.search_experiments()]
        raise UserError(
            f"there is no MLflow experiment '{experiment}'{nearest(experiment, names)}: name it as recorded"
        )
    order = ["attributes.start_time DESC"]
    if "'" not in run:
        named = f"attributes.run_name = '{run}' and tags.`scalecv.run_key` != ''"
        found = client.search_runs([there.experiment_id], named, max_results=1, order_by=order)
        if found:
            return str(found[0].info.run_id)
    names = [one.info.run_name for one in client.search_runs([there.experiment_id], max_results=1000, order_by=order)]
    raise UserError(
        f"no run named '{run}' in {where}{nearest(run, names)}: expected runs:/ID, or the name of one of its "
        f"{len(names)} newest runs (another experiment: --experiment)"
    )


def _reachable(uri: str | None) -> str:
    found = mlflow_client.tracking_uri(uri)
    problem = mlflow_client.probe(found)
    if problem:
        raise UserError(f"{problem}: start it, or set MLFLOW_TRACKING_URI to the one that has the run")
    file = mlflow_client.sqlite_path(found)
    if file and not file.exists():
        raise UserError(f"no MLflow database at {file}: go to the folder of the run, or set MLFLOW_TRACKING_URI")
    return found


def _run_id(run: str) -> str:
    run_id = run.removeprefix("runs:/").split("/")[0]
    if not re.fullmatch(r"[0-9a-zA-Z_-]{1,64}", run_id):
        raise UserError(f"'{run}' is not a run; expected runs:/ID with the ID that the MLflow UI shows")
    return run_id


def _run(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise StorageError(f"MLflow does not give run {run_id}: {error}") from None
        raise UserError(f"no run {run_id} in MLflow at {storage.without_secrets(client.tracking_uri)}") from None


def _of_run(client: Any, model: str) -> Any:
    run_id = _run_id(model)
    run = _run(client, run_id)
    name = model.removeprefix("runs:/").partition("/")[2]
    models = client.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "creation_timestamp", "ascending": False}],
    )
    named = [m for m in models if not name or m.name == name]
    if not named:
        kept = f"; it has {', '.join(sorted({m.name for m in models}))}" if models else ""
        raise UserError(f"{model}: the run has no model{kept}. Its status is {run.info.status}: let it finish first")
    return named[0]


def _of_name(client: Any, model: str) -> Any:
    """The logged model of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-ID`."""
    from mlflow.exceptions import MlflowException

    word = model.removeprefix("models:/")
    try:
        if re.fullmatch(r"m-[0-9a-f]{32}", word):
            return client.get_logged_model(word)
        name, at, alias = word.partition("@")
        if at:
            found = client.get_model_version_by_alias(name, alias)
        else:
            name, slash, number = word.partition("/")
            if not slash or not number.isdigit():
                raise UserError(f"{model}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
            found = client.get_model_version(name, number)
        model_id = getattr(found, "model_id", None) or found.source.removeprefix("models:/")
        return client.get_logged_model(model_id)
    except MlflowException as error:
        names = [m.name for m in client.search_registered_models()]
        name = re.split("[@/]", word)[0]
        if name in names:
            aliases = sorted(client.get_registered_model(name).aliases)
            raise UserError(
                f"{model}: '{name}' is registered, but not this alias or version "
                f"(aliases: {', '.join(aliases) or 'none'}): {str(error).splitlines()[0]}"
            ) from None
        known = ", ".join(names) or "none"
        raise UserError(
            f"{model}: no such model in MLflow's registry{nearest(name, names)} (registered: {known})"
        ) from None


def _is_bundle(place: str) -> bool:
    try:
        return storage.exists(storage.join(place, "bundle.json"))
    except (StorageDenied, StorageError, UserError, OSError):
        return False


def _fetched(found: Any, model: str) -> str:
    """MLflow's copy of a bundle in the user's cache."""
    from mlflow.artifacts import download_artifacts

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalecv" / "models" / found.model_id
    ready = sorted(cache.rglob("bundle.json"))
    if not (cache / ".complete").exists():
        cache.mkdir(parents=True, exist_ok=True)
        download_artifacts(artifact_uri=f"models:/{found.model_id}", dst_path=str(cache))
        (cache / ".complete").touch()
        ready = sorted(cache.rglob("bundle.json"))
    if not ready:
        raise UserError(f"{model} is a model, but not a scalecv bundle (no bundle.json in it)")
    return str(ready[0].parent)
