"""Where MLflow is, whether it answers, and a quiet client for it."""

import json
import logging
import os
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from scalecv.errors import ConfigError, nearest
from scalecv.storage import without_secrets

HTTP = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PLACES = ("databricks", "uc", "databricks-uc")
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # One call to a dead server blocks for 247 s by default; the sender tries again by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(configured: str | None = None) -> str:
    """The tracking URI in use: `configured`, else MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db.

    Paths of SQLite files come back absolute.
    Raises: ConfigError: a scheme that MLflow does not know, or a plain path.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns.db'}"
    scheme, sep, rest = uri.partition(":")
    base = scheme.partition("+")[0]
    if not sep and uri in PLACES:
        return uri
    if not sep or base == "file":
        raise ConfigError(
            f"MLflow tracking URI {uri!r}: folders are not supported by MLflow any more; "
            f"write http://HOST:PORT of a server, or sqlite:///PATH/mlruns.db"
        )
    if base not in (*HTTP, *DATABASES, *PLACES):
        raise ConfigError(
            f"MLflow tracking URI {without_secrets(uri)!r} has the unknown scheme {scheme!r}"
            f"{nearest(base, (*HTTP, *DATABASES))}; expected http://HOST:PORT, or sqlite:///PATH/mlruns.db"
        )
    if base in HTTP and not urlsplit(uri).hostname:
        raise ConfigError(f"MLflow tracking URI {uri!r} has no host; expected http://HOST:PORT")
    if base == "sqlite":
        path = rest.removeprefix("///")
        if path == rest or not path:
            raise ConfigError(f"MLflow tracking URI {uri!r} names no file; expected sqlite:///PATH/mlruns.db")
        return f"{scheme}:///{os.path.abspath(os.path.expanduser(path))}"
    return uri.rstrip("/") if base in HTTP else uri


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite tracking URI, None for any other."""
    return Path(uri.partition("///")[2]) if uri.startswith("sqlite") else None


def probe(uri: str, timeout_s: float = 5.0) -> str | None:
    """Why the tracking server cannot be used now, or None when it answers.

    Raises: ConfigError: the URI itself is wrong.
    """
    uri = tracking_uri(uri)
    file = sqlite_path(uri)
    if file is not None:
        folder = next(p for p in [file.parent, *file.parents] if p.exists())
        target = file if file.exists() else folder
        return None if os.access(target, os.W_OK) else f"{target} cannot be written"
    if not uri.startswith(HTTP):
        return None
    shown = without_secrets(uri)
    body = json.dumps({"max_results": 1}).encode()
    request = urllib.request.Request(  # noqa: S310 - the scheme was looked at
        f"{_without_user(uri)}/api/2.0/mlflow/experiments/search",
        data=body,
        headers={"Content-Type": "application/json", **_login(uri)},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return f"{shown} wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        if error.code == 403:
            return f"{shown} refuses this client or host name (403): see `mlflow server --allowed-hosts`"
        return f"{shown} answers {error.code} {error.reason}: is it an MLflow server?"
    except ValueError:
        return f"{shown} answers, but not as an MLflow server does"
    except OSError as error:
        reason = getattr(error, "reason", error)
        return f"{shown} does not answer ({getattr(reason, 'strerror', None) or reason})"
    return None


def client(uri: str) -> Any:
    """A quiet `MlflowClient`; the first one of a SQLite file creates the tables, one process at a time."""
    mlflow = quiet_mlflow()
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # logging a model has no other way to learn it
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow wrote it there, where the user's own word stood
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before
    file = sqlite_path(uri)
    if file is None:
        return mlflow.MlflowClient(uri)
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock", timeout=120):
        made = mlflow.MlflowClient(uri)
        made.search_experiments(max_results=1)
    return made


@lru_cache(maxsize=1)
def quiet_mlflow() -> Any:
    """The module `mlflow` without telemetry, progress bars and log lines; failing calls end in seconds."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def artifact_location(uri: str, experiment: str) -> str | None:
    """Folder for the artifacts of a new experiment; None leaves it to the tracking server."""
    if uri.partition("+")[0].partition(":")[0] not in DATABASES:
        return None
    file = sqlite_path(uri)
    root = (file.parent if file else Path.cwd()) / "mlartifacts"
    return (root / quote(experiment, safe=" ").replace("%", "-")).as_uri()


def _login(uri: str) -> dict[str, str]:
    import base64

    parts = urlsplit(uri)
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD") or ""
    if user:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _without_user(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
