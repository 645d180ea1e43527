"""Training in this process: what it leaves, how it goes on, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scalecv import config
from scalecv.artifacts import bundle, spool
from scalecv.errors import ConfigError, DataError, IntegrityError, Interrupted, ScalecvError, UserError
from scalecv.shards import row_groups
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from scalecv.train import runs
from scalecv.train.run import train
from tests import make
from tests.train import ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def many_groups(tmp_path_factory):
    """The pictures of three shapes in small row groups."""
    folder = tmp_path_factory.mktemp("groups")
    make.shapes(folder / "images")
    told = {"source": str(folder / "images"), "to": str(folder / "data"), "layout": "imagefolder"}
    ingest(IngestOptions(**told, row_group_mb=0.004, concurrency=0))
    return told["to"]


def mlflow_run(result):
    from mlflow import MlflowClient

    client = MlflowClient(result.tracking_uri)
    return client, client.get_run(result.run_id)


def test_a_run_leaves_everything(shapes):
    told = []
    result = train(shapes(train__epochs=6), tell=told.append)
    assert result.status == "finished" and result.epochs == 6
    assert result.metrics["val/accuracy"] > 0.5 and "test/accuracy" in result.metrics
    assert len(result.weights_hash) == len(result.order_hash) == 64

    facts = bundle.read_facts(result.bundle)
    assert facts.classes == ("circle", "square", "triangle")
    assert facts.metrics["val/accuracy"] == result.metrics["val/accuracy"]
    opened = bundle.open_bundle(result.bundle)
    assert bundle.weights_hash(opened.model.state_dict()) == facts.weights_hash

    client, run = mlflow_run(result)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.003" and run.data.params["model.arch"] == "resnet10"
    assert (
        run.data.metrics["val/accuracy"] > 0 and run.data.metrics["best/val/accuracy"] == result.metrics["val/accuracy"]
    )
    assert run.data.tags["scalecv.version.torch"]
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert len(client.get_metric_history(result.run_id, "val/loss")) == 6
    names = {f.path for f in client.list_artifacts(result.run_id)}
    assert {"experiment.yaml", "pictures"} <= names
    shown = {f.path for f in client.list_artifacts(result.run_id, "pictures/val")}
    assert {f"pictures/val/{n}" for n in ("confusion.png", "per_class.csv", "predictions.png", "worst.png")} <= shown
    lines = [e for e in told if e.get("is_epoch_end")]
    assert [e["epoch"] for e in lines] == [1, 2, 3, 4, 5, 6]


def test_the_model_loads_in_mlflow_without_pickle(shapes):
    import mlflow
    import numpy as np

    result = train(shapes())
    mlflow.set_tracking_uri(result.tracking_uri)
    model = mlflow.pyfunc.load_model(f"runs:/{result.run_id}/model")
    found = model.predict(np.zeros((2, 16, 16, 3), np.uint8))
    assert found.shape == (2, 3)
    from scalecv.artifacts.tracking import lookup

    assert bundle.read_facts(lookup(f"runs:/{result.run_id}")).weights_hash


def test_the_same_command_again_says_that_all_is_done_and_more_epochs_go_on(shapes):
    first = train(shapes())
    again = train(shapes())
    assert again.was_complete and again.weights_hash == first.weights_hash and again.run_id == first.run_id
    more = train(shapes(train__epochs=5))
    assert more.epochs == 5 and more.is_continued and not more.was_complete and more.run_id == first.run_id
    assert more.weights_hash != first.weights_hash
    new = train(shapes(), new=True)
    assert new.weights_hash == first.weights_hash and new.run_id != first.run_id


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_stopped_in_the_middle_it_ends_as_if_it_had_not_been(shapes, schedule):
    """A stop request in the middle of epoch 2: the state is saved at that step, and the rest is the same bits."""
    quiet = train(shapes(name="quiet", train__schedule=schedule))
    experiment = shapes(name="stopped", train__schedule=schedule)

    def stop_in_epoch_2(event):
        if event.get("epoch") == 1 and event.get("is_epoch_end"):
            (Path(runs.home(experiment)) / "001" / "STOP").write_bytes(b"stop")

    with pytest.raises(Interrupted) as said:
        train(experiment, tell=stop_in_epoch_2)
    assert said.value.exit_code == 75
    rest = train(experiment)
    assert rest.is_continued
    assert (rest.weights_hash, rest.order_hash) == (quiet.weights_hash, quiet.order_hash)


SCRIPT = """
import sys, os, signal, json
from scalecv import config
from scalecv.train.run import train
experiment = config.build(json.loads(sys.argv[1]), "test")
def tell(event):
    if event.get("is_epoch_end") and event["epoch"] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
train(experiment, tell=tell)
"""


def test_killed_it_ends_as_if_it_had_not_been(shapes, tmp_path):
    quiet = train(shapes(name="quiet", train__epochs=5))
    experiment = shapes(name="killed", train__epochs=5)
    command = [sys.executable, "-c", SCRIPT, experiment.model_dump_json(), "2"]
    assert (
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == -signal.SIGKILL
    )
    told = []
    rest = train(experiment, tell=told.append)
    assert any("goes on in epoch" in e.get("message", "") for e in told)
    assert (rest.weights_hash, rest.order_hash) == (quiet.weights_hash, quiet.order_hash)
    client, _ = mlflow_run(rest)
    from mlflow.entities import ViewType

    found = client.search_runs(["1"], "attributes.run_name = 'killed'", ViewType.ALL)
    assert len(found) == 1, "one run, whatever happened"
    assert [p.step for p in client.get_metric_history(rest.run_id, "val/accuracy")] == sorted(
        {p.step for p in client.get_metric_history(rest.run_id, "val/accuracy")}
    )


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(shapes):
    quiet = train(shapes(name="quiet", train__epochs=4))
    first = train(shapes(name="damaged", train__epochs=3))
    newest = max((Path(first.run_uri) / "checkpoints").iterdir())
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    told = []
    rest = train(shapes(name="damaged", train__epochs=4, train__schedule="cosine"), tell=told.append)
    assert any("passed over" in e.get("message", "") and newest.name in e["message"] for e in told)
    assert rest.order_hash == quiet.order_hash


def damaged_copy(dataset, folder):
    """A copy with one flipped bit in its training rows."""
    row_groups.footers.cache_clear()
    opened = open_dataset(str(shutil.copytree(dataset, folder)))
    shard = opened.manifest.shards_of("train")[0]
    data = bytearray((folder / shard.path).read_bytes())
    data[shard.byte_ranges[0][0] + 300] ^= 8
    (folder / shard.path).write_bytes(data)
    return str(folder), shard.row_groups[0]


def test_a_damaged_row_group_is_left_out_within_the_budget(shapes, many_groups, tmp_path):
    """Said once in an epoch, counted in its numbers; more than data.max_bad is one clear error."""
    uri, rows = damaged_copy(many_groups, tmp_path / "damaged")
    told = []
    train(shapes(data__uri=uri, data__max_bad=0.5, train__epochs=2), tell=told.append)
    assert [e["metrics"]["data/rows_left_out"] for e in told if e.get("is_epoch_end")] == [rows, rows]
    said = [event["message"] for event in told if "left out" in event.get("message", "")]
    assert len(said) == 2 and all(one.startswith(f"{rows} rows left out: {uri}/") for one in said), said
    with pytest.raises(IntegrityError, match=r"row group 0 is damaged.*data.max_bad=0.01 allows 0") as error:
        train(shapes(name="strict", data__uri=uri))
    assert error.value.exit_code == 1


@pytest.mark.chaos
def test_two_ranks_have_one_budget(shapes, many_groups, tmp_path):
    """What two ranks cannot read counts together, and a row group that both need is told and counted once."""
    uri, rows = damaged_copy(many_groups, tmp_path / "damaged")
    manifest = open_dataset(uri).manifest
    shard, total = manifest.shards_of("train")[0], manifest.splits["train"]
    data = bytearray((tmp_path / "damaged" / shard.path).read_bytes())
    for group in range(1, len(shard.row_groups), 2):
        data[shard.byte_ranges[group][0] + 300] ^= 8
        rows += shard.row_groups[group]
    (tmp_path / "damaged" / shard.path).write_bytes(data)
    experiment = shapes(name="within", data__uri=uri, data__max_bad=rows / total, train__epochs=1)
    ends, said = ranks.ended(ranks.start(experiment, 2, tmp_path))
    assert ends == [0, 0], said
    events = spool.read(Path(runs.home(experiment)) / "001" / "spool.jsonl", most_bytes=1 << 30)[0]
    told = [event["message"] for event in events if "left out" in event.get("message", "")]
    assert len(told) == len(set(told)) and sum(int(one.split()[0]) for one in told) == rows, told
    ends, said = ranks.ended(ranks.start(shapes(name="above", data__uri=uri, data__max_bad=0.01), 2, tmp_path))
    assert ends == [1, 1] and any("rows of train cannot be read" in one for one in said), said


def test_a_second_live_run_of_one_name_is_refused(shapes):
    experiment = shapes()
    with runs.lease(experiment), pytest.raises(UserError, match="is being trained by process"):
        train(experiment)
    train(experiment)


def test_a_lease_of_a_dead_process_is_taken_over(shapes, tmp_path):
    experiment = shapes()
    script = (
        "import sys, os, json; from scalecv import config; from scalecv.train import runs;"
        "e = config.build(json.loads(sys.argv[1]), 't'); c = runs.lease(e); c.__enter__(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", script, experiment.model_dump_json()], cwd=tmp_path, check=False)
    assert (Path(runs.home(experiment)) / "lease.json").exists()
    with runs.lease(experiment):
        pass


def test_another_experiment_under_the_same_name_is_refused(shapes):
    train(shapes(train__epochs=1))
    with pytest.raises(ConfigError, match=r"train.lr was 0.003 and is 0.5.*--new"):
        train(shapes(train__epochs=1, train__lr=0.5))


def test_segmentation_of_four_bands(fields):
    result = train(fields())
    assert {"val/iou", "val/f1", "val/loss", "val/trivial_iou"} <= set(result.metrics)
    facts = bundle.read_facts(result.bundle)
    assert facts.call.in_channels == 4 and facts.call.outputs == 1
    assert len(facts.pixels.mean) == 4 and facts.pixels.mean[3] > facts.pixels.mean[0]


def test_accumulation_equals_one_batch(shapes):
    """8 images at a time, twice, or 16 at once: the same update, where no norm looks at the batch."""
    one = train(shapes(name="one", model__norm="group", train__optimizer="sgd", train__epochs=1))
    two = train(shapes(name="two", model__norm="group", train__optimizer="sgd", train__epochs=1, train__micro_batch=8))
    a, b = (bundle.read_weights(r.bundle, bundle.read_facts(r.bundle)) for r in (one, two))
    assert one.order_hash == two.order_hash
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5


def test_exact_does_not_depend_on_what_is_beside_it(shapes):
    """Twice the same, and the same after a stop in the middle."""
    keys = {"train__exact": True, "model__norm": "group"}
    quiet = train(shapes(name="quiet", **keys))
    experiment = shapes(name="stopped", **keys)

    def stop(event):
        if event.get("is_epoch_end") and event["epoch"] == 1:
            (Path(runs.home(experiment)) / "001" / "STOP").write_bytes(b"stop")

    with pytest.raises(Interrupted):
        train(experiment, tell=stop)
    assert train(experiment).weights_hash == quiet.weights_hash


def test_a_stop_at_the_end_of_an_epoch_is_heard(shapes):
    """An epoch of five steps and a point every hundred: the only place to stop is the epoch's end."""
    experiment = shapes(track__log_every=100)

    def stop(event):
        if event.get("is_epoch_end") and event["epoch"] == 1:
            (Path(runs.home(experiment)) / "001" / "STOP").write_bytes(b"stop")

    with pytest.raises(Interrupted):
        train(experiment, tell=stop)
    assert train(experiment).epochs == 3


def test_bf16_channels_last_clipping_and_class_weights(shapes):
    result = train(
        shapes(train__precision="bf16", train__channels_last=True, train__clip_norm=1.0, loss__cross_entropy=1.0,
               loss__class_weights="balanced", train__epochs=2)
    )  # fmt: skip
    assert result.metrics["val/loss"] < 5


def test_fp16_without_a_gpu_says_so(shapes):
    told = []
    train(shapes(train__precision="fp16", train__epochs=1), tell=told.append)
    assert any("fp16 needs a GPU" in e.get("message", "") for e in told)


def test_early_stopping(shapes):
    result = train(shapes(train__epochs=20, train__early_stop_patience=1, train__early_stop_min_delta=2.0))
    assert result.status == "stopped" and result.epochs == 2
    assert train(shapes(train__epochs=20, train__early_stop_patience=1, train__early_stop_min_delta=2.0)).was_complete


def test_a_mended_mistake_does_not_claim_the_name(shapes):
    with pytest.raises(ConfigError, match="resnet19"):
        train(shapes(model__arch="resnet19"))
    assert train(shapes(train__epochs=1)).status == "finished"


def test_a_record_does_not_import_code(shapes):
    with pytest.raises(ConfigError, match="comes from a record"):
        train(shapes(model__arch="os:getcwd", model__stem="default"), allow_import=False)


def test_a_network_of_ones_own(shapes, tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def build(in_channels, outputs, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, outputs))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = train(shapes(model__arch="mynet:build", model__stem="default", model__args={"width": 4}))
    with pytest.raises(ConfigError, match="mynet:build"):
        bundle.open_bundle(result.bundle)
    assert bundle.open_bundle(result.bundle, allow_import=True).model


def test_nan_stops_before_the_update(shapes):
    with pytest.raises(ScalecvError, match=r"the gradient is .* weights were not updated"):
        train(shapes(train__lr=1e30, train__optimizer="sgd", train__schedule="constant"))


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"data__uri": "nowhere/data"}, DataError, ["nowhere/data"]),
        ({"task": "segment"}, ConfigError, ["task=segment", "task=classify"]),
        ({"model__in_channels": 5}, ConfigError, ["model.in_channels=5", "3 bands"]),
        ({"data__bands": [1, 4]}, ConfigError, ["data.bands=[1, 4]", "3 bands"]),
        ({"train__metric": "accuracy"}, ConfigError, ["train.metric=accuracy", "val/accuracy"]),
        ({"train__metric": "val/acuracy"}, ConfigError, ["no acuracy", "accuracy"]),
        ({"data__color": "gray", "data__bands": [2]}, ConfigError, ["data.bands=[2]"]),
        ({"model__arch": "resnet19"}, ConfigError, ["resnet19", "resnet18"]),
        ({"train__batch": 1, "model__norm": "batch"}, ConfigError, ["one image at a time", "model.norm=group"]),
        ({"train__batch": 1, "model__norm": "sync"}, ConfigError, ["one image at a time", "model.norm=group"]),
        ({"model__arch": "vgg11", "model__stem": "default", "data__size_px": 16}, ConfigError, ["16x16"]),
        ({"loss__bce": 1.0}, ConfigError, ["bce"]),
        ({"train__exact": True}, ConfigError, ["model.norm=batch", "group or frozen"]),
        ({"train__exact": True, "model__norm": "group", "train__batch": 18}, ConfigError, ["train.batch=18"]),
        ({"train__exact": True, "model__norm": "group", "data__decode": "gpu"}, ConfigError, ["data.decode=gpu"]),
        ({"track__uri": "http://me:secret@127.0.0.1:1"}, ConfigError, ["MLFLOW_TRACKING_USERNAME"]),
        ({"track__storage": "/proc/nowhere"}, UserError, ["/proc/nowhere"]),
        ({"track__uri": "redis://x"}, UserError, ["redis"]),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(shapes, keys, kind, words):
    with pytest.raises(kind) as said:
        train(shapes(**keys))
    assert said.value.exit_code == 2
    assert all(word in str(said.value) for word in words), said.value
    assert "secret" not in str(said.value)
    assert not [*Path("runs").glob("shapes/*")] and not Path("mlruns.db").exists(), "nothing is left"


def test_mlflow_away_is_no_reason_to_stop(shapes, monkeypatch):
    told = []
    began = time.monotonic()
    result = train(shapes(track__uri="http://127.0.0.1:9", train__epochs=1), tell=told.append)
    assert result.status == "finished" and result.run_id is None
    assert any("127.0.0.1:9" in e.get("message", "") for e in told)
    assert time.monotonic() - began < 90
    assert (Path(result.run_uri) / "spool.jsonl").stat().st_size > 0


def test_ctrl_c_saves_and_exits_75(shapes, tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(config.dump(shapes(train__epochs=200)))
    process = subprocess.Popen(
        [sys.executable, "-m", "scalecv", "train", str(file), "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    ends = time.monotonic() + 120
    while not any("epoch 1/" in line for line in lines) and time.monotonic() < ends:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75, lines
    reader.join(5)
    assert "the same command goes on" in lines[-1]
    saved = sorted((tmp_path / "runs/shapes/001/checkpoints").iterdir())
    assert (saved[-1] / "manifest.json").exists()
    assert json.loads((saved[-1] / "resume.json").read_text())["updates"] > 0
