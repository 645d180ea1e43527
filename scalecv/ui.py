"""`scalecv ui`: the MLflow UI on the store in use, on this machine only."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from scalecv import storage
from scalecv.artifacts import mlflow_client
from scalecv.errors import UserError
from scalecv.loopback import is_loopback

START_S = 180.0


def serve_ui(uri: str | None = None, host: str = "127.0.0.1", port: int = 5000, *, insecure: bool = False) -> int:
    """Serve the UI until Ctrl-C; the URI of a server that runs already is only printed.

    Args:
        uri: MLflow store; None takes MLFLOW_TRACKING_URI, else ./mlruns.db.
        host: address to listen on; MLflow asks nobody for a login.
        port: port to listen on.
        insecure: allow another address than loopback.
    Returns: exit code, 0 after Ctrl-C.
    Raises: UserError: no runs yet, the port is taken, or the address is open to others.
    """
    store = mlflow_client.tracking_uri(uri)
    if store.startswith(mlflow_client.HTTP):
        problem = mlflow_client.probe(store)
        sys.stdout.write(storage.without_secrets(store) + "\n")
        if problem:
            raise UserError(problem)
        return 0
    if not is_loopback(host) and not insecure:
        raise UserError(
            f"--host {host}: there is no login, everybody who reaches {host}:{port} could read and delete runs. "
            f"Keep 127.0.0.1 and use a tunnel (ssh -L {port}:127.0.0.1:{port}), or say --insecure"
        )
    file = mlflow_client.sqlite_path(store)
    if file and not file.exists():
        raise UserError(f"no runs yet: no MLflow database at {file}. Go to the folder of a run, or name it with --uri")
    _check_free(host, port)
    return _serve(store, host, port)


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), reuse_port=False):
            pass
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port") from None


def _serve(store: str, host: str, port: int) -> int:
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": store,  # not on the command line, where `ps` shows a password
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    root = mlflow_client.artifact_location(store, "default")
    if root:
        command += ["--default-artifact-root", root]
    before = signal.signal(signal.SIGTERM, _interrupt)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = _until_ready(server, host, port)
        if said is not None:
            raise UserError(f"the MLflow server did not start: {said}")
        sys.stderr.write(f"MLflow on {storage.without_secrets(store)}: http://{host}:{port}   (Ctrl-C ends it)\n")
        for _ in server.stderr or ():
            pass  # its access log
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(server)


def _until_ready(server: "subprocess.Popen[str]", host: str, port: int) -> str | None:
    """Wait for the first answer; what the server said last if it does not come up."""
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if server.poll() is not None:
            return (server.stderr.read() if server.stderr else "")[-500:]
        try:
            shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host  # noqa: S104
            with urllib.request.urlopen(f"http://{shown}:{port}/health", timeout=2):
                return None
        except urllib.error.HTTPError:
            return None  # it answers
        except OSError:
            time.sleep(0.2)
    return f"no answer for {START_S:.0f} s"


def _end(server: "subprocess.Popen[str]") -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt
