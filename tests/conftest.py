"""Fixtures for all tests: the shared data, a real S3 server, one local Ray; each is made when first asked for."""

import atexit
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scalecv.testing.servers import S3Server
from scalecv.testing.store_proxy import StoreProxy

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
_ENDINGS = (".zip", ".tar", ".tar.xz")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Each process of the tests has Rays of its own, and sees no other's.
    _temporary = tempfile.mkdtemp(prefix=f"{worker}-")
    os.environ["RAY_TMPDIR"] = _temporary
    atexit.register(shutil.rmtree, _temporary, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that train come first: of two that run at a time, a long one at the end would run alone."""
    items.sort(key=lambda item: item.path.parent.name not in ("train", "search", "e2e"))


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


@pytest.fixture(scope="session")
def _s3_plan(tmp_path_factory: pytest.TempPathFactory) -> S3Server:
    """Ports and keys, known before the server starts: a Ray that starts first hands them to its workers."""
    return S3Server(tmp_path_factory.mktemp("s3"))


@pytest.fixture(scope="session")
def _s3_server(_s3_plan: S3Server) -> Iterator[S3Server]:
    _s3_plan.start()
    try:
        yield _s3_plan
    finally:
        _s3_plan.kill()
        shutil.rmtree(_s3_plan.folder, ignore_errors=True)


@pytest.fixture
def s3(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A real S3 server (SeaweedFS), with the usual variables set for this test."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreProxy]:
    """A proxy before the S3 server, which can be told to misbehave."""
    with StoreProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="session")
def ray_local(_s3_plan: S3Server) -> Iterator[None]:
    """One Ray of two CPUs for the whole session; its workers know the keys of the S3 server."""
    from scalecv import runtime

    environment = _s3_plan.environment
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
