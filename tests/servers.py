"""Real servers for tests: an MLflow server on SQLite and a Ray head with a token, each ended by its pid."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(what, timeout_s: float, process: subprocess.Popen | None = None, log: Path | None = None) -> None:
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        if process is not None and process.poll() is not None:
            break
        try:
            if what():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"not ready: {log.read_text()[-2000:] if log else what}")


def end(process: subprocess.Popen, quietly: bool = True) -> None:
    """End a process and its children; it leads a process group of its own."""
    if process.poll() is None or not quietly:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        except ProcessLookupError:
            return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(10)


@dataclass
class MlflowServer:
    folder: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        env = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": "",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        log = self.folder / "mlflow.log"
        self.process = subprocess.Popen(
            command, stdout=log.open("ab"), stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        ready = lambda: urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200  # noqa: E731
        wait_for(ready, 90, self.process, log)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.process = None


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), free_port())
    server.start()
    yield server
    if server.process is not None:
        end(server.process)


@dataclass
class RayHead:
    port: int
    dashboard_port: int
    token: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def jobs(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"


@contextmanager
def ray_head(folder: Path, home: Path, cpus: int = 2) -> Iterator[RayHead]:
    """A head with token authentication and ports of its own."""
    token = "a" * 20 + str(os.getpid())
    ports = {
        name: free_port()
        for name in (
            "port",
            "dashboard-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "ray-client-server-port",
        )
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "HOME": str(home)}
    # Workers find this checkout's scalecv only where the job brings it along.
    command = [str(BIN / "ray"), "start", "--head", f"--num-cpus={cpus}", "--object-store-memory=150000000"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", "--block"]
    command += [f"--temp-dir={folder}"]
    log = home / "ray-head.log"
    process = subprocess.Popen(
        command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=env, start_new_session=True
    )
    head = RayHead(ports["port"], ports["dashboard-port"], token)
    request = urllib.request.Request(f"{head.jobs}/api/version", headers={"Authorization": f"Bearer {token}"})
    try:
        wait_for(lambda: urllib.request.urlopen(request, timeout=2).status == 200, 90, process, log)
        yield head
    finally:
        end(process, quietly=False)
