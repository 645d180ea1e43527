"""Which bands a model leans on: the one that tells, then noise, and a constant one exactly not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from scalecv import config
from scalecv.cli.main import app
from scalecv.errors import ConfigError, DataError
from scalecv.serve.bands import rank_bands
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.train.drop_bands import drop_bands, runs_without
from scalecv.train.run import train
from tests.small import fields, fields_dataset

__all__ = ["fields", "fields_dataset"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Tiles of noise, a constant and a band that tells the class; and the bundle of a small network."""
    import rasterio

    root = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    for split, rows in (("train", 64), ("val", 33)):
        for row in range(rows):
            bands = np.stack([rng.normal(500, 100, (16, 16)), np.full((16, 16), 77), rng.normal(500, 100, (16, 16))])
            bands[2] += 400 * (row % 2)
            file = root / "tiles" / split / ("low", "high")[row % 2] / f"{row}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            profile = {"driver": "GTiff", "width": 16, "height": 16, "count": 3, "dtype": "int16"}
            with rasterio.open(file, "w", **profile) as out:
                out.write(bands.astype(np.int16))
    data = str(root / "data")
    ingest(IngestOptions(source=str(root / "tiles"), to=data, layout="imagefolder", concurrency=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        keys = {
            "name": "bands", "task": "classify", "data.uri": data, "model.arch": "resnet10", "model.stem": "small",
            "train.epochs": 4, "train.batch": 16, "train.lr": 3e-3, "train.threads": 1, "data.decode_threads": 1,
            "scale.workers": 0, "track.storage": str(root / "runs"),
        }  # fmt: skip
        experiment = config.build(config.with_overrides({}, keys), "test")
        yield experiment, train(experiment).bundle, data


def test_the_informative_band_is_first_and_a_constant_one_exactly_nothing(trained, tmp_path):
    _, model, data = trained
    told: list[dict[str, str]] = []
    found = rank_bands(model, data, batch=16, repeats=3, to=str(tmp_path), tell=told.append)
    assert told[0]["message"].startswith("3 bands in 3 orders: 15 times 33 rows of val")
    assert told[1]["message"] == "order 1 of 3"
    assert re.fullmatch(r"order 2 of 3, about \d+:\d\d left", told[2]["message"])
    by_band = {one.band: one for one in found.bands}
    assert found.metric == "val/accuracy" and found.value > 0.9 and found.rows == 33
    assert found.bands[0].band == 3 and by_band[3].permuted > 0.3 and by_band[3].at_mean > 0.2
    assert abs(by_band[1].permuted) < 0.1
    assert (by_band[2].permuted, by_band[2].permuted_se, by_band[2].at_mean) == (0, 0, 0)
    assert (tmp_path / "bands.png").read_bytes().startswith(b"\x89PNG")
    assert rank_bands(model, data, batch=16, repeats=3).bands == found.bands, "the seed says all"


def test_the_verb_prints_a_table_or_json(trained):
    _, model, data = trained
    shown = CliRunner().invoke(app, ["bands", model, data, "--repeats", "2", "-q"])
    assert shown.exit_code == 0 and shown.stdout.splitlines()[2].startswith("band 3")
    wrong = CliRunner().invoke(app, ["bands", model])
    assert "takes MODEL and DATASET" in str(wrong.exception)


def test_trainings_without_a_band_have_names_of_their_own(trained):
    experiment, _, _ = trained
    runs = dict(runs_without(experiment))
    assert [one.name for one in runs.values()] == ["bands", *(f"bands-without-{band}" for band in (1, 2, 3))]
    assert runs[2].data.bands == (1, 3) and runs[None].data.bands == experiment.data.bands
    assert json.loads(runs[2].model_dump_json())["train"] == json.loads(experiment.model_dump_json())["train"]


def test_trained_without_the_band_that_tells_the_loss_grows_most(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment, _, _ = trained
    keys = {"name": "dropped", "train.metric": "val/loss", "track.storage": str(tmp_path / "runs")}
    tree = config.with_overrides(experiment.model_dump(mode="json"), keys)
    told: list[str] = []
    metric, found = drop_bands(config.build(tree, "test"), tell=lambda event: told.append(event.get("message", "")))
    assert re.fullmatch(r"4 trainings of \d+ epochs?: all bands, and without each of them", told[0])
    assert told[1] == "dropped (1 of 4): all bands"
    assert any(re.fullmatch(r"dropped-without-1 \(2 of 4\): without band 1, about \d+:\d\d left", one) for one in told)
    assert metric == "val/loss" and [one.band for one in found][:2] == [None, 3]
    assert found[1].lost == pytest.approx(found[1].value - found[0].value) and found[1].lost > 0.1


def test_nothing_to_compare_with_is_said_before_the_start(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment, model, _ = trained
    for split, count in (("train", 4), ("test", 1)):
        for row in range(count):
            file = tmp_path / "few" / split / ("low", "high")[row % 2] / f"{row}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(
                (Path(experiment.data.uri).parent / f"tiles/train/{file.parent.name}/{row}.tif").read_bytes()
            )
    data = str(tmp_path / "data")
    ingest(IngestOptions(source=str(tmp_path / "few"), to=data, layout="imagefolder", split="100/0/0", concurrency=0))
    keys = {"name": "none", "data.uri": data, "track.storage": str(tmp_path / "runs")}
    tree = config.with_overrides(experiment.model_dump(mode="json"), keys)
    with pytest.raises(ConfigError, match="has no val split to compare bands on"):
        drop_bands(config.build(tree, "test"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match="one row in test"):
        rank_bands(model, data, split="test")


def test_the_band_that_shows_the_fields_is_first(fields):
    result = train(fields(train__epochs=12, train__lr=3e-3, track__pictures=0))
    found = rank_bands(result.bundle, fields().data.uri, batch=8, repeats=2)
    assert found.metric == "val/iou" and found.value > 0.5
    assert found.bands[0].band == 4 and found.bands[0].permuted > 0.3 and found.bands[0].at_mean > 0.3
    assert all(abs(one.permuted) < 0.1 for one in found.bands[1:])
