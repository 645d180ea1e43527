"""What is proposed follows from what was measured, and only where it helped."""

import json
import subprocess
import sys

import pytest

from scalecv import config
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from scalecv.speed import advice, trial
from scalecv.speed.parts import Part, Speeds, measure
from tests.batches.test_collate import rows

RECIPE = """
name: shapes
task: classify
data: {{uri: {data}, decode_threads: 1, augment: {{hflip: 0.5}}}}
model: {{arch: resnet10, stem: small}}
train: {{batch: 8, lr: 0.003, threads: 1}}
scale: {{workers: 2}}
"""


@pytest.fixture
def recipe(shapes_dataset, tmp_path):
    path = tmp_path / "shapes.yaml"
    path.write_text(RECIPE.format(data=shapes_dataset))
    return str(path)


def speeds(waits, bottleneck="decoding"):
    return Speeds((Part("feed", 1.0, ""),), {"wait": 0.1}, waits, 1.0, bottleneck)


def test_an_interval_excludes_one_only_where_the_pairs_agree():
    mean, low, high = advice.interval([1.2, 1.21, 1.19, 1.2, 1.22])
    assert 1.18 < low < mean < high < 1.22
    assert advice.interval([1.5, 0.7, 1.3, 0.8, 1.1])[1] < 1
    # Student's t with 2 degrees of freedom: 4.303 standard errors to each side.
    mean, low, _ = advice.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(2.0) and low == pytest.approx(2 / 2 ** (4.303 / 3**0.5), rel=1e-3)


def test_the_change_fits_the_bottleneck(recipe):
    experiment = config.load(recipe, {})
    assert list(advice.candidate(experiment, speeds(0.5))[0]) == ["data.decode_threads"]
    assert list(advice.candidate(experiment, speeds(0.01))[0]) == ["train.channels_last"]
    done = config.load(recipe, {"train.channels_last": True, "train.precision": "bf16", "train.compile": True})
    assert advice.candidate(done, speeds(0.01)) == ({}, "")
    bucket = experiment.model_copy(update={"data": experiment.data.model_copy(update={"uri": "s3://a/b"})})
    assert list(advice.candidate(bucket, speeds(0.5, "reading"))[0]) == ["cache.dir"]


def test_where_there_is_a_gpu_it_may_decode(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    photographs = {"data.uri": str(tmp_path / "data"), "data.size_px": 24}
    for row in rows(("JPEG",)):
        path = tmp_path / "source" / str(row.label) / f"{row.id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row.image)
    source = str(tmp_path / "source")
    ingest(IngestOptions(source=source, to=photographs["data.uri"], layout="imagefolder", concurrency=0))
    assert advice.candidate(config.load(recipe, photographs), speeds(0.5))[0] == {"data.decode": "gpu"}
    others = [{**photographs, **key} for key in ({"data.decode": "gpu"}, {"scale.gpu": "no"}, {"data.color": "gray"})]
    for keys in (*others, {"data.size_px": 24}):  # the last ones are PNGs
        assert list(advice.candidate(config.load(recipe, keys), speeds(0.5))[0]) == ["data.decode_threads"], keys


def test_what_did_not_help_is_not_proposed():
    good = advice.Advice({"train.channels_last": True}, "By rounding.", 1.2, 1.1, 1.3, 5)
    bad = advice.Advice({"train.channels_last": True}, "By rounding.", 1.01, 0.95, 1.07, 5)
    assert good.line().startswith("set train.channels_last=true: 1.20 times as fast (1.10 to 1.30, 5 pairs)")
    assert "not proposed" in bad.line()


def test_a_trial_trains_and_leaves_nothing(recipe, shapes_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    seen = trial.run(config.load(recipe, {}), open_dataset(str(shapes_dataset)), 0.2)
    assert seen.images_per_s > 0 and seen.steps >= 1 and 0 <= seen.wait_share <= 1
    assert seen.seconds["compute"] > 0 and set(seen.seconds) == set(trial.PARTS)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_every_part_is_measured(recipe):
    found = measure(config.load(recipe, {}), 0.2)
    assert [part.name for part in found.parts] == ["reading", "decoding", "feed", "network", "training"]
    assert all(part.images_per_s > 0 for part in found.parts)
    assert found.bottleneck in ("reading", "decoding", "the network")
    assert len(found.lines()) == 7


def test_a_change_is_tried_in_turns(recipe, monkeypatch):
    monkeypatch.setattr(advice, "PAIRS", 2)
    monkeypatch.setattr(advice, "measure", lambda experiment, tell: speeds(0.0, "the network"))
    said: list[str] = []
    _, found = advice.advise(recipe, {"scale.workers": 0}, seconds=0.4, tell=said.append)
    assert found.change == {"train.channels_last": True} and found.pairs == 2
    assert 0 < found.low <= found.ratio <= found.high and found.helps == (found.low > 1)
    assert said == ["trying train.channels_last=true, 2 pairs of runs"]


def test_doctor_refuses_what_is_not_an_experiment():
    command = [sys.executable, "-m", "scalecv", "doctor", "nowhere.yaml", "--json"]
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "no experiment at nowhere.yaml" in wrong.stderr
    assert "Traceback" not in wrong.stderr and json.loads(wrong.stdout)["exit_code"] == 2
