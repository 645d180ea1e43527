"""A recorded run again: identical, within noise, or what differs and why; real runs, real MLflow on SQLite."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalecv.artifacts.compare import compare_records
from scalecv.artifacts.record import read_record
from scalecv.cli.main import app
from scalecv.errors import ConfigError, DataError, UserError
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.train.reproduce import judge, reproduce, tolerance
from scalecv.train.run import train
from tests import make

ROOT = Path(__file__).parents[2]


def tags_of(run_id):
    return read_record(run_id).tags


def test_a_run_is_reproduced_bit_for_bit_and_the_verdict_is_logged(shapes):
    first = train(shapes(train__epochs=2, track__log_every=3))
    told = []
    result = reproduce(f"runs:/{first.run_id}", tell=told.append)
    assert result.verdict == "identical" and result.because is None and result.first_step is None
    assert (result.weights_hash, result.order_hash) == (first.weights_hash, first.order_hash)
    assert result.run_id != first.run_id and result.reproduced_run_id == first.run_id
    assert not any("differs" in e.get("message", "") for e in told)
    made = read_record(result.run_id)
    assert made.name == "shapes-reproduced" and made.experiment["track"]["log_every"] == 3
    assert made.tags["scalecv.reproduces"] == first.run_id and made.tags["scalecv.verdict"] == "identical"
    assert made.experiment["data"]["version"] == int(made.data["version"])
    assert made.curves["train/batch_loss"] == read_record(first.run_id).curves["train/batch_loss"] != {}

    again = reproduce(f"runs:/{first.run_id}", tell=told.append)
    assert again.run_id == result.run_id and any("was complete already" in e.get("message", "") for e in told)

    from mlflow import MlflowClient

    MlflowClient(first.tracking_uri).set_tag(first.run_id, "data/order_hash", "0" * 64)
    done = CliRunner().invoke(app, ["reproduce", f"runs:/{first.run_id}"])
    assert done.exit_code == 1 and done.stdout.startswith("differs: the order of rows is another; ")
    assert tags_of(result.run_id)["scalecv.verdict"] == "differs"


def test_threads_are_those_of_the_record_and_others_are_named(shapes):
    """Where train.threads is empty, the number that torch used is repeated, whatever this machine has."""
    import torch

    first = train(shapes(train__epochs=1, train__threads=None))
    tags = tags_of(first.run_id)
    packages = "torch torchvision ray numpy segmentation-models-pytorch timm pyarrow pillow mlflow scalecv"
    assert {f"scalecv.version.{name}" for name in packages.split()} <= set(tags)
    for name in "python platform cpu cpu_count gpu gpu_driver code worker_cpu cpu_capability device cuda".split():
        assert tags[f"scalecv.{name}"], name
    used = tags["scalecv.threads"]
    assert used == str(torch.get_num_threads()) and tags["scalecv.ranks"] == "1"
    told = []
    other = str(int(used) + 1)
    result = reproduce(first.run_id, overrides={"train.threads": int(other)}, tell=told.append)
    assert [(d.kind, d.key, d.a, d.b) for d in result.differences] == [("hardware", "threads", used, other)]
    assert any(f"hardware differs from the record: threads {used} → {other}" in e.get("message", "") for e in told)
    if result.weights_hash == first.weights_hash:
        assert result.verdict == "identical"
    else:
        assert result.because == "hardware" and result.first_step is not None


def test_micro_batches_are_those_that_the_record_found(shapes):
    first = train(shapes(train__epochs=1, train__micro_batch="auto", model__norm="group"))
    found = read_record(first.run_id)
    assert found.experiment["train"]["micro_batch"] == "auto" and found.micro_batch == 16
    result = reproduce(first.run_id)
    assert result.verdict == "identical" and result.differences == []
    assert read_record(result.run_id).experiment["train"]["micro_batch"] == 16


NETWORK = (
    "from torch import nn\n"
    "def build(in_channels, outputs):\n"
    "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
    "                         nn.Linear(4, outputs))\n"
)


def git(folder, *words):
    about = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *about, *words], cwd=folder, check=True, capture_output=True)


def test_changed_code_is_said_before_the_run_and_is_the_reason(shapes, tmp_path, monkeypatch):
    """A network of the user's own in a git repository, edited after the recorded run."""
    (tmp_path / "ournet.py").write_text(NETWORK)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "ournet.py")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = train(shapes(model__arch="ournet:build", model__stem="default"))
    with pytest.raises(ConfigError, match=r"comes from a record"):
        reproduce(first.run_id)

    (tmp_path / "ournet.py").write_text(NETWORK.replace("nn.ReLU()", "nn.GELU()"))
    monkeypatch.delitem(sys.modules, "ournet", raising=False)
    told = []
    result = reproduce(first.run_id, allow_import=True, tell=told.append)
    monkeypatch.delitem(sys.modules, "ournet", raising=False)
    said = [e["message"] for e in told if "message" in e]
    assert said[0].startswith("code differs from the record: git changes none → ") and "ournet.py" in said[0]
    assert result.because == "code" and result.order_hash == first.order_hash
    assert result.first_step == 1, "the first point of the curve"
    assert "first at step 1 (train/batch_loss " in result.reason
    assert "because of code: git changes none → " in result.reason


def test_verdicts_from_records_alone(shapes):
    """One real record, and copies of it with one planted change each."""
    run = read_record(train(shapes(train__epochs=1)).run_id)
    assert judge(compare_records(run, run), "classify").verdict == "identical"

    def against(metrics=(), curve=(), **tags):
        curves = {**run.curves, "train/batch_loss": {**run.curves["train/batch_loss"], **dict(curve)}}
        tags = {k.replace("__", "."): v for k, v in tags.items()}
        other = replace(
            run, tags={**run.tags, **tags}, metrics={**run.metrics, **dict(metrics)}, curves=curves, run_id="x"
        )
        return judge(compare_records(run, other), "classify")

    steps = sorted(run.curves["train/batch_loss"])
    moved = {"curve": {steps[1]: 9.0}, "weights_hash": "f" * 64}
    found = against(**moved, scalecv__version__torch="2.0.0")
    assert (found.verdict, found.first_step, found.because) == ("within noise", steps[1], "environment")
    assert "torch 2." in found.reason and "is chance" in found.reason
    found = against(**moved, scalecv__threads="64", metrics={"test/accuracy": run.metrics["test/accuracy"] + 0.9})
    assert (found.verdict, found.first_step, found.because) == ("differs", steps[1], "hardware")
    assert found.reason == (
        f"differs: first at step {steps[1]} (train/batch_loss {run.curves['train/batch_loss'][steps[1]]:.9g}, now 9), "
        "because of hardware: threads 1 → 64"
    )
    found = against(**moved, scalecv__cpu="other", scalecv__version__numpy="1")
    assert found.because == "environment" and "other inputs that differ: hardware" in found.reason
    found = against(**moved)
    assert found.because == "no recorded reason" and "for no recorded reason: nondeterminism of CPU" in found.reason
    found = against(**moved, scalecv__resumed_at="12")
    assert "went on from update 12" in found.reason
    found = against(**moved, **{"data/order_hash": "0" * 64})
    assert found.verdict == "differs" and "the order of rows is another" in found.reason
    found = against(weights_hash="f" * 64)
    assert found.first_step is None and "only after the last recorded loss" in found.reason


def test_the_tolerance_is_the_two_proportion_test():
    """Against the textbook: 0.50 and 0.60 on 200 rows have z = 2.01, on 180 rows z = 1.91."""
    assert tolerance(0.5, 0.6, 200) < 0.1 < tolerance(0.5, 0.6, 180)
    assert tolerance(1.0, 1.0, 50) == 0


@pytest.fixture
def own_shapes(shapes, tmp_path):
    """An experiment on a dataset that a test may change."""
    make.shapes(tmp_path / "images", count=60)
    options = IngestOptions(
        source=str(tmp_path / "images"), to=str(tmp_path / "data"), layout="imagefolder", concurrency=0
    )
    ingest(options)
    return options, lambda **keys: shapes(**{"data__uri": str(tmp_path / "data"), **keys})


def test_data_is_pinned_and_said_to_be_missing_before_the_start(own_shapes, tmp_path):
    options, experiment = own_shapes
    first = train(experiment(train__epochs=1))
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    for picture in make.shapes(tmp_path / "more", count=30, seed=1).rglob("*.png"):
        picture.rename(tmp_path / "images" / picture.parent.name / f"more-{picture.name}")
    appended = ingest(options.model_copy(update={"append": True}))
    assert appended.version > int(read_record(first.run_id).data["version"])
    result = reproduce(first.run_id)
    assert result.verdict == "identical", "a new version does not matter"
    assert read_record(result.run_id).data == read_record(first.run_id).data

    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"which is not there.*Nothing was started.*set data.uri") as said:
        reproduce(first.run_id, to="gone")
    assert said.value.exit_code == 2 and not (tmp_path / "runs/gone").exists()
    moved = reproduce(first.run_id, to="moved", overrides={"data.uri": str(tmp_path / "copy")})
    assert moved.verdict == "identical", "the same data elsewhere"

    make.shapes(tmp_path / "others", count=60, seed=2)
    ingest(options.model_copy(update={"source": str(tmp_path / "others")}))
    with pytest.raises(DataError, match=r"is not the data that run .* fingerprint is .* recorded was"):
        reproduce(first.run_id, to="changed")
    assert not (tmp_path / "runs/changed").exists()


def test_what_cannot_be_reproduced_is_refused(shapes):
    first = train(shapes(train__epochs=1))
    for words, said in (
        ({"to": "shapes"}, "is the recorded run's own name"),
        ({"overrides": {"data.decode": "gpu"}}, r"data.decode=auto is a part of what is reproduced: the GPU's pixels"),
        ({"overrides": {"train.lr": 1.0}}, r"train.lr is a part of what is reproduced.*scalecv train runs:/"),
        ({"overrides": {"scale.workers": 3}}, r"train.batch=16 cannot be shared"),
    ):
        with pytest.raises(ConfigError, match=said):
            reproduce(first.run_id, **words)
    with pytest.raises(UserError, match=r"no run 0000"):
        reproduce("runs:/" + "0" * 32)
    with pytest.raises(UserError, match=r"no run named 'shaps' .*did you mean 'shapes'"):
        reproduce("shaps")
    from mlflow import MlflowClient

    client = MlflowClient(first.tracking_uri)
    client.set_terminated(first.run_id, "KILLED")
    with pytest.raises(UserError, match=r"its status is KILLED: let it train to its end"):
        reproduce(first.run_id)


@pytest.mark.chaos
def test_the_command_line_prints_one_json_object(shapes, tmp_path):
    first = train(shapes(train__epochs=1))
    command = [sys.executable, "-m", "scalecv", "reproduce", f"runs:/{first.run_id}", "--to", "twin", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    keys = "run_id reproduced_run_id verdict first_step because differences weights_hash order_hash metrics"
    assert set(keys.split()) <= set(told)
    assert told["verdict"] == "identical" and told["weights_hash"] == first.weights_hash
    assert told["reproduced_run_id"] == first.run_id and told["metrics"]["test/accuracy"]["delta"] == 0
