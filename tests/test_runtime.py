import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scalecv import runtime
from scalecv.errors import UserError
from tests.servers import free_port, ray_head


def drive(code, **env):
    """Run code in a process of its own, as a user's driver; Ray's state is global to a process."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env={**plain, **env}
    )
    return done.returncode, done.stdout.strip(), done.stderr


CONNECT = "import sys\nfrom scalecv import runtime\nfrom scalecv.errors import UserError\n"
TRY = CONNECT + "try:\n  runtime.connect()\nexcept UserError as e:\n  print(e); sys.exit(2)\n"


@pytest.mark.parametrize(
    "address, says",
    [
        ("nonsense", "not HOST:PORT"),
        ("ray://h:10001", "the Ray Client"),
        ("http://h:8265", "scalecv submit"),
        ("no-such-host.invalid:6379", "no Ray cluster answers"),
    ],
)
def test_a_wrong_address_is_one_clear_error(address, says):
    with pytest.raises(UserError, match=says):
        runtime.head_version(address)


def test_a_dead_address_is_told_at_once():
    began = time.monotonic()
    code, out, _ = drive(TRY, RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert code == 2 and "no Ray cluster answers at RAY_ADDRESS" in out and "unset RAY_ADDRESS" in out
    assert time.monotonic() - began < 40


def test_the_token_is_found_where_ray_looks(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.auth_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert runtime.auth_token() == "from-home"
    (tmp_path / "t").write_text("from-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "t"))
    assert runtime.auth_token() == "from-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert runtime.auth_token() == "given"


@pytest.mark.e2e
def test_ray_starts_here_quietly_and_workers_find_the_users_modules(tmp_path):
    (tmp_path / "mine.py").write_text("ANSWER = 42\n")
    code = CONNECT + (
        f"info = runtime.connect(local_cpus=2, code_dirs=[{str(tmp_path)!r}])\n"
        "again = runtime.connect()\n"
        "import ray, json\n"
        "from scalecv.errors import ConfigError\n"
        "@ray.remote(num_cpus=1)\n"
        "def ask():\n"
        "    import mine, scalecv\n"
        "    return mine.ANSWER\n"
        "said = []\n"
        "for args in [(8, 1, False), (2, 3, False), (1, 1, True), (2, 1, False)]:\n"
        "    try:\n"
        "        runtime.check_fits(*args); said.append('fits')\n"
        "    except ConfigError as e:\n"
        "        said.append(str(e))\n"
        "answer = ray.get(ask.remote())\n"
        "runtime.shutdown()\n"
        "print(json.dumps([info.started, info.cpus, again == info, answer, said, ray.is_initialized()]))\n"
    )
    rc, out, err = drive(code, HOME=str(tmp_path))
    assert rc == 0, err
    started, cpus, same, answer, said, still = json.loads(out)
    assert started and cpus == 2 and same and answer == 42 and not still
    assert "scale.workers=8 needs 8 CPUs, the cluster has 2: set scale.workers=2" in said[0]
    assert "scale.cpus_per_worker=2" in said[1] and "scale.gpu=no" in said[2] and said[3] == "fits"
    assert err == ""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with ray_head(Path(f"/tmp/scalecv-{os.getpid()}-r"), home) as running:
        yield running


@pytest.mark.e2e
def test_joining_takes_the_token_and_names_what_is_wrong(head, tmp_path):
    home = {"HOME": str(tmp_path), "RAY_ADDRESS": head.address}
    join = CONNECT + (
        "info = runtime.connect(); runtime.shutdown(); import ray\n"
        "print(info.started, info.cpus, info.nodes, ray.is_initialized())\n"
    )
    rc, out, err = drive(join, RAY_AUTH_TOKEN=head.token, **home)
    assert rc == 0 and out == "False 2.0 1 True", err
    rc, out, _ = drive(TRY, RAY_AUTH_TOKEN="wrong", **home)
    assert rc == 2 and "did not accept the token" in out
    rc, out, _ = drive(TRY, **home)
    assert rc == 2 and "wants a token and none is set" in out
    rc, out, _ = drive(TRY, RAY_AUTH_TOKEN=head.token, **{**home, "RAY_ADDRESS": head.jobs.removeprefix("http://")})
    assert rc == 2 and "is no Ray head" in out
