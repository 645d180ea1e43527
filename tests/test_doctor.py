import subprocess
import sys

import pytest

from scalecv.doctor import Check, checks, exit_code
from tests.servers import free_port

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def plain_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


def by_name(found, name):
    return next(c for c in found if c.name == name)


def test_a_plain_machine_is_well(tmp_path):
    found = checks([str(tmp_path)])
    names = [c.name for c in found]
    assert names == ["python", "cpu", "jpeg", "gpu", "disk", "shm", "ray", "head", "mlflow", "storage"]
    assert by_name(found, "storage").ok and by_name(found, "mlflow").ok and by_name(found, "python").ok
    assert "ray 2." in by_name(found, "python").found


def test_what_is_broken_is_named_with_what_to_do(monkeypatch):
    dead = free_port()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{dead}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    found = checks(["s3://bucket/x", "ftp://host/x", "/proc/cannot"])
    assert exit_code(found) == 1
    assert "no Ray cluster answers" in by_name(found, "ray").found
    mlflow = by_name(found, "mlflow")
    assert mlflow.ok is False and "does not answer" in mlflow.found and mlflow.do
    assert [c.ok for c in found if c.name == "storage"][:2] == [False, False]
    assert by_name(found, "clock").ok is False
    assert "secret" not in str(found)


def test_a_wrong_tracking_uri_is_one_line_among_the_others(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://h")
    found = checks([])
    assert by_name(found, "mlflow").ok is False and "did you mean 'http'" in by_name(found, "mlflow").found
    assert by_name(found, "python").ok


def test_only_what_is_broken_counts_for_the_exit_code():
    assert exit_code([Check("a", True, ""), Check("b", None, "")]) == 0


def test_it_is_quick_and_brings_nothing_heavy():
    heavy = "[m for m in ('ray', 'mlflow', 'torch') if m in sys.modules]"
    code = f"import sys, scalecv.doctor as d; d.checks([]); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("[]")
