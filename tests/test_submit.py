import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from scalecv import staging
from scalecv.errors import ConfigError, UserError
from scalecv.submit import submit
from tests.servers import free_port, ray_head
from tests.small import shapes_dataset

__all__ = ["shapes_dataset"]

EXPERIMENT = """
name: a
task: classify
data: {uri: ds}
model: {arch: resnet18}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's folder: an experiment, a module and data beside it."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    (tmp_path / "mine.py").write_text("def net(): ...\n")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "weights.bin").write_bytes(b"0" * 1000)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"0" * 1000)
    (tmp_path / "job").mkdir()
    return tmp_path


def stage(here, *argv, same=True, env=()):
    return staging.stage(argv, env, here / "job", same_machine=same)


# ---- what a job takes along


def test_code_goes_along_and_data_does_not(here):
    staged = stage(here, "train", "e.yaml", "train.lr=0.1", "--json")
    assert staged.files == ("e.yaml", "mine.py", "pkg/__init__.py")
    assert staged.argv[:4] == ("train", "e.yaml", "train.lr=0.1", "--json")
    assert staged.argv[4:] == (f"data.uri={here}/ds", f"track.storage={here}/runs")
    assert staged.env == {"MLFLOW_TRACKING_URI": f"sqlite:///{here}/mlruns.db"}
    assert "planted-secret" not in str(staged)


def test_an_experiment_in_another_folder_keeps_the_callers_paths(here):
    (here / "sub").mkdir()
    (here / "e.yaml").rename(here / "sub" / "e.yaml")
    staged = stage(here, "train", "sub/e.yaml", "data.uri=other", "track.storage=s3://b/runs")
    assert staged.argv[1] == "e.yaml" and staged.argv[-1] == f"data.uri={here}/other"


def test_paths_of_other_verbs_become_absolute(here):
    staged = stage(here, "ingest", "images", "--to", "out", "--layout", "imagefolder", "--append")
    assert staged.argv == ("ingest", f"{here}/images", "--to", f"{here}/out", "--layout", "imagefolder", "--append")
    assert stage(here, "ingest", "s3://b/x", "--to=s3://b/y").argv == ("ingest", "s3://b/x", "--to=s3://b/y")


@pytest.mark.parametrize(
    "argv, says",
    [
        (("train", "e.yaml"), "data.uri=ds is a path of this machine"),
        (("train", "e.yaml", "data.uri=s3://b/d"), "track.storage=runs is a path of this machine"),
        (("ingest", "images", "--to", "s3://b/d"), "images is a path of this machine"),
        (("ingest", "s3://b/x", "--to", "d"), "d is a path of this machine"),
        (("train", "e.yaml", "data.uri=s3://b/d", "track.storage=s3://b/r"), "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_cluster_elsewhere_is_given_no_paths_of_this_machine(here, argv, says):
    with pytest.raises(ConfigError, match=says):
        stage(here, *argv, same=False)


def test_a_cluster_elsewhere_with_everything_in_reach(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    staged = stage(here, "train", "e.yaml", "data.uri=s3://b/d", "track.storage=s3://b/r", same=False)
    assert staged.env == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "AWS_REGION": "eu-central-1"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        stage(here, "train", "e.yaml", "data.uri=s3://b/d", "track.storage=s3://b/r", same=False)


def test_secrets_go_along_only_by_name(here, monkeypatch):
    assert stage(here, "schema", env=["AWS_SECRET_ACCESS_KEY"]).env["AWS_SECRET_ACCESS_KEY"] == "planted-secret"
    with pytest.raises(UserError, match="--env NOT_SET"):
        stage(here, "schema", env=["NOT_SET"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:planted-pw@mlflow:5000")
    with pytest.raises(ConfigError, match="holds a login") as raised:
        stage(here, "schema")
    assert "planted-pw" not in str(raised.value)


def test_what_is_wrong_is_told_before_anything_is_sent(here):
    with pytest.raises(ConfigError, match=r"did you mean 'train\.lr'"):
        stage(here, "train", "e.yaml", "train.lrr=1")
    with pytest.raises(ConfigError, match=r"did you mean 'e\.yaml'"):
        stage(here, "train", "ee.yaml")
    (here / "big.py").write_bytes(b"#" * (11 << 20))
    with pytest.raises(UserError, match="at most 10 MB"):
        stage(here, "train", "e.yaml")


# ---- the job server


@pytest.mark.parametrize("address", ["ray://h:10001", "h", "module://x", "http://u:p@h:8265"])
def test_an_address_of_another_kind_is_one_clear_error(address):
    with pytest.raises(UserError, match="job server"):
        submit(["schema"], address)


def test_nobody_there_and_no_verb(here):
    with pytest.raises(UserError, match="no job server answers"):
        submit(["schema"], f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="does not run as a job"):
        submit(["ui"])


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(Path(f"/tmp/scalecv-{os.getpid()}-j"), tmp_path_factory.mktemp("home")) as running:
        yield running


def run(head, here, *argv, token=True, **env):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    if token:
        plain["RAY_AUTH_TOKEN"] = head.token
    code = (
        "import sys; from scalecv.submit import submit; from scalecv.errors import UserError\n"
        "try: sys.exit(submit(sys.argv[2:], sys.argv[1]))\n"
        "except UserError as e: sys.stderr.write(str(e)); sys.exit(2)"
    )
    command = [sys.executable, "-c", code, head.jobs, *argv]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=here,
        env={**plain, "HOME": str(here), **env},
    )


@pytest.mark.e2e
def test_a_job_brings_back_its_lines_its_result_and_its_exit_code(head, here):
    good = run(head, here, "doctor", "--json", str(here))
    bad = run(head, here, "train", "e.yaml")
    refused = run(head, here, "schema", token=False)
    out, err = good.communicate(timeout=120)
    assert good.returncode == 0, err
    found = json.loads(out)
    assert found["ok"] and {c["name"] for c in found["checks"]} >= {"ray", "storage"}
    assert "Running entrypoint for job scalecv-doctor-" in err and "planted-secret" not in err
    out, err = bad.communicate(timeout=120)
    assert bad.returncode == 2 and out == "" and f"{here}/ds" in err, (bad.returncode, err)
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 2 and "wants a token and none is set" in err and "Traceback" not in err


@pytest.mark.e2e
def test_a_training_job_is_a_run_in_mlflow(head, here, shapes_dataset):
    (here / "e.yaml").write_text(
        f"name: sent\ntask: classify\ndata: {{uri: {shapes_dataset}, decode_threads: 1}}\n"
        "model: {arch: resnet10, stem: small}\ntrain: {epochs: 1, batch: 16, threads: 1}\nscale: {workers: 1}\n"
    )
    out, err = run(head, here, "train", "e.yaml", "--json").communicate(timeout=300)
    told = json.loads(out.splitlines()[-1])
    assert told["status"] == "finished" and told["run_id"], err
    from scalecv.artifacts.mlflow_client import client

    recorded = client(f"sqlite:///{here}/mlruns.db").get_run(told["run_id"])
    assert recorded.info.status == "FINISHED" and recorded.data.metrics["test/rows"] == told["metrics"]["test/rows"]


@pytest.mark.e2e
def test_ctrl_c_tells_how_to_leave_and_leaves_the_job_running(head, here, monkeypatch):
    (here / "scalecv-waits.py").write_text("")
    code = (
        "import sys; from scalecv import submit as s\n"
        "s._entrypoint = lambda argv, here: 'echo begun; sleep 600'\n"
        "sys.exit(s.submit(['schema'], sys.argv[1]))"
    )
    env = {**os.environ, "RAY_AUTH_TOKEN": head.token}
    process = subprocess.Popen(
        [sys.executable, "-c", code, head.jobs], stderr=subprocess.PIPE, text=True, cwd=here, env=env
    )
    lines = []
    reader = Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()

    def until(word):
        ends = time.monotonic() + 120
        while not any(word in line for line in lines):
            assert time.monotonic() < ends and process.poll() is None, lines
            time.sleep(0.1)

    until("begun")
    process.send_signal(signal.SIGINT)
    until("Ctrl-C once more")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 75
    reader.join(5)
    job = next(line.split()[1] for line in lines if line.startswith("job scalecv-"))
    assert f"ray job stop --address {head.jobs} {job}" in "".join(lines)

    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head.jobs, headers={"Authorization": f"Bearer {head.token}"})
    assert client.get_job_status(job) == "RUNNING"
    client.stop_job(job)
