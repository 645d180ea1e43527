"""Fixtures for all tests: the shared data, a real S3 server, one local Ray; each is made when first asked for."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
_ENDINGS = (".zip", ".tar", ".tar.xz")


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from the name of a shared data set to its folder; archives are unpacked once in a session."""
    top = tmp_path_factory.mktemp("shared")

    def folder(name: str) -> Path:
        if (DATA / name).is_dir():
            return DATA / name
        if not (top / name).exists():
            archive = next((DATA / (name + e) for e in _ENDINGS if (DATA / (name + e)).exists()), None)
            assert archive is not None, f"no data set {name} in {DATA}"
            if archive.suffix == ".zip":
                with zipfile.ZipFile(archive) as packed:
                    packed.extractall(top)
            else:
                with tarfile.open(archive) as packed:
                    packed.extractall(top, filter="data")
        return top / name

    return folder


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that outgoing connections take."""
    found: list[int] = []
    while len(found) < count:
        port = 10000 + secrets.randbelow(20000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


@dataclass(frozen=True)
class S3:
    """A running S3 server of this test session."""

    endpoint: str
    filer: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """The URI of a new, empty bucket."""
        name = f"b{secrets.token_hex(6)}"
        request = urllib.request.Request(f"{self.filer}/buckets/{name}/", method="POST")
        urllib.request.urlopen(request, timeout=10).close()
        return f"s3://{name}"


@pytest.fixture(scope="session")
def _s3_plan() -> tuple[list[int], S3]:
    """Ports and keys, known before the server starts: a Ray that starts first hands them to its workers."""
    ports = free_ports(8)
    here = "http://127.0.0.1"
    return ports, S3(f"{here}:{ports[6]}", f"{here}:{ports[4]}", secrets.token_hex(8), secrets.token_hex(16))


@pytest.fixture(scope="session")
def _s3_server(_s3_plan: tuple[list[int], S3], tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    ports, plan = _s3_plan
    folder = tmp_path_factory.mktemp("s3")
    process = start_s3(folder, ports, plan)
    try:
        yield plan
    finally:
        process.kill()  # a polite end takes SeaweedFS 15 s
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3(_s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A real S3 server (SeaweedFS), with the usual variables set for this test."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture(scope="session")
def ray_local(_s3_plan: tuple[list[int], S3]) -> Iterator[None]:
    """One Ray of two CPUs for the whole session; its workers know the keys of the S3 server."""
    from scalecv import runtime

    environment = _s3_plan[1].environment
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        runtime.connect(local_cpus=2)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    yield
    runtime.shutdown()


def start_s3(folder: Path, ports: list[int], plan: S3) -> subprocess.Popen[bytes]:
    """Start SeaweedFS and wait until a signed put and get work."""
    rights = {"actions": ["Admin", "Read", "List", "Tagging", "Write"]}
    keys = {"credentials": [{"accessKey": plan.key, "secretKey": plan.secret}]}
    (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "tests", **keys, **rights}]}))
    (folder / "data").mkdir()
    weed = Path(sys.executable).parent / "weed"
    command = [str(weed), "-alsologtostderr=false", "-logtostderr=true", "server"]
    command += [f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    command += [f"-master.port={ports[0]}", f"-master.port.grpc={ports[1]}", "-master.volumeSizeLimitMB=256"]
    command += [f"-volume.port={ports[2]}", f"-volume.port.grpc={ports[3]}", "-volume.max=2000"]
    command += ["-volume.preStopSeconds=0", "-filer", f"-filer.port={ports[4]}", f"-filer.port.grpc={ports[5]}"]
    command += [f"-filer.localSocket={folder / 'f.sock'}", "-s3", f"-s3.port={ports[6]}", f"-s3.port.grpc={ports[7]}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}"]
    command += [f"-s3.localSocket={folder / 's3.sock'}"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    probe = (
        "import sys; from scalecv import storage; "
        "storage.put(sys.argv[1], b'1'); assert storage.get(sys.argv[1]) == b'1'"
    )
    until = time.monotonic() + 60
    while True:
        try:
            bucket = plan.bucket()
            environment = os.environ | plan.environment | {"SCALECV_STORAGE_GIVE_UP_S": "2"}
            ready = subprocess.run(
                [sys.executable, "-c", probe, f"{bucket}/probe"], env=environment, capture_output=True, check=False
            )
            if ready.returncode == 0:
                return process
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise RuntimeError(f"SeaweedFS did not start: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.3)
