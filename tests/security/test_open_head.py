"""A real Ray head without a token: a job for it is refused where it counts as elsewhere, and doctor names it."""

import os
import subprocess
from pathlib import Path

import pytest

from scalecv import doctor
from scalecv.errors import UserError
from scalecv.submit import submit
from tests.servers import BIN, end, free_port, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture
def open_head(tmp_path):
    """On loopback alone."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    ports = {name: free_port() for name in (*names, "ray-client-server-port")}
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    command = [str(BIN / "ray"), "start", "--head", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir=/tmp/scalecv-{os.getpid()}-o"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = Path(tmp_path / "head.log")
    process = subprocess.Popen(
        command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=env, start_new_session=True
    )
    try:
        from scalecv.submit import _get

        def answers():
            try:
                return _get(f"http://127.0.0.1:{ports['dashboard-port']}", "/api/version", None)[0] == 200
            except UserError:
                return False

        wait_for(answers, 120, process, log)
        yield ports
    finally:
        end(process)


@pytest.mark.chaos
def test_it_is_refused_and_named(open_head, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    # 127.1 leads here, and nothing says so but the resolver.
    with pytest.raises(UserError, match=r"http://127.1:\d+ runs jobs of anyone who reaches it"):
        submit(["schema"], f"http://127.1:{open_head['dashboard-port']}")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{open_head['port']}")
    (found,) = [check for check in doctor.checks() if check.name == "ray"]
    assert found.ok is None and "without token, on loopback" in found.found
    monkeypatch.setattr(doctor, "is_loopback", lambda _: False)  # as if it listened elsewhere
    found = doctor._openness("ray", os.environ["RAY_ADDRESS"], "it")
    assert found.ok is False and "takes jobs of anyone" in found.found and "RAY_AUTH_MODE=token" in found.do
