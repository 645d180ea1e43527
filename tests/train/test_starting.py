"""Transfer: starting weights of a recorded run, frozen parts, rates of their own, and going on without asking again."""

import shutil
from pathlib import Path

import pytest

from scalecv.artifacts import bundle
from scalecv.errors import ConfigError, Interrupted, UserError
from scalecv.train import runs
from scalecv.train.run import train
from tests.train import ranks


def weights_of(result):
    return bundle.read_weights(result.bundle, bundle.read_facts(result.bundle))


def recorded(result):
    from mlflow import MlflowClient

    return MlflowClient(result.tracking_uri).get_run(result.run_id).data


TRANSFER = {
    "model__weights_scope": "encoder",
    "model__freeze": "encoder",
    "train__lr_factors": {"fc": 0.5},
    "train__optimizer": "adamw",
}


@pytest.mark.chaos
def test_a_frozen_encoder_of_an_earlier_run_stays_and_going_on_asks_nobody(shapes, tmp_path):
    """From runs:/ID with another head; stopped in the middle, without the registry, to the same bits."""
    first = train(shapes(name="first", train__epochs=1))
    before = weights_of(first)
    keys = {"model__weights": f"runs:/{first.run_id}", **TRANSFER}
    told = []
    quiet = train(shapes(name="quiet", **keys), tell=told.append)
    after = weights_of(quiet)
    assert {name.split(".")[0] for name in before if not (before[name] == after[name]).all()} == {"fc"}
    said = next(one["message"] for one in told if one.get("message", "").startswith("model.weights: "))
    assert f"from {first.bundle}; start fresh: fc.weight, fc.bias" in said
    assert any("parameters do not learn" in one.get("message", "") for one in told)
    data = recorded(quiet)
    assert data.tags["scalecv.starting_weights_hash"] == bundle.read_facts(first.bundle).weights_hash
    assert data.params["model.in_channels_init"] == "copy" and data.params["model.freeze"] == "encoder"
    assert int(data.params["model.trainable"]) < int(data.params["model.parameters"])
    assert 0 < data.metrics["system/latency_p50_ms"] <= data.metrics["system/latency_p95_ms"]
    assert data.metrics["system/peak_memory_mb"] > 0 and data.metrics["time/total_train_s"] > 0

    experiment = shapes(name="stopped", **keys)

    def stop(event):
        if event.get("epoch") == 1 and event.get("is_epoch_end"):
            (Path(runs.home(experiment)) / "001" / "STOP").write_bytes(b"stop")

    with pytest.raises(Interrupted):
        train(experiment, tell=stop)
    shutil.rmtree(first.bundle)
    Path(tmp_path / "mlruns.db").rename(tmp_path / "away.db")
    rest = train(experiment)
    assert rest.is_continued and rest.weights_hash == quiet.weights_hash


def test_other_weights_at_the_place_before_the_first_checkpoint_are_refused(shapes, tmp_path):
    first, other = (train(shapes(name=name, seed=seed, train__epochs=1)) for seed, name in enumerate(("one", "two")))
    place = tmp_path / "start"
    shutil.copytree(first.bundle, place)
    experiment = shapes(name="again", model__weights=str(place))
    train(experiment)
    shutil.rmtree(Path(runs.home(experiment)) / "001" / "checkpoints")
    (Path(runs.home(experiment)) / "001" / "result.json").unlink()
    shutil.rmtree(place)
    shutil.copytree(other.bundle, place)
    with pytest.raises(ConfigError, match=r"are not those that .*/again/001 began with .*--new"):
        train(experiment)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model__weights": "runs:/0123456789abcdef0123456789abcdef"}, "no run 0123456789abcdef|no MLflow database"),
        ({"model__freeze": ["layr1"]}, "did you mean 'layer1'"),
        ({"train__lr_factors": {"fcc": 0.1}}, "did you mean 'fc'"),
        ({"model__in_channels_init": ["red", "zero"]}, "give 3 bands: name for each band"),
    ],
)
def test_refused_before_a_step(shapes, keys, said):
    with pytest.raises(UserError, match=said):
        train(shapes(name="refused", **keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model__arch": "pan"}, "32x32 pixels vanish"),
        ({"model__arch": "fpn", "data__size_px": 48}, "needs multiples of 32: set data.size_px="),
        ({"model__arch": "deeplabv3plus", "train__micro_batch": 1}, "batch normalisation needs two"),
        ({"model__arch": "deeplabv3plus", "train__micro_batch": 1, "model__norm": "sync"}, "normalisation needs two"),
        ({"model__arch": "segformer", "data__size_px": 40}, "needs multiples of 32"),
        ({"model__arch": "dpt"}, "needs a tu-vit"),
        ({"model__arch": "deeplabv3", "model__encoder": "vgg11"}, "take resnet"),
    ],
)
def test_combinations_that_cannot_work(fields, keys, said):
    with pytest.raises(ConfigError, match=said):
        train(fields(name="refused", **keys))


def test_weights_that_get_no_gradient_and_frozen_ones_train_on_two_ranks(fields, tmp_path):
    """PSPNet takes three stages of its encoder: the others are there, and no gradient ever reaches them."""
    experiment = fields(name="two", model__arch="pspnet", model__freeze=["encoder.layer1"], train__epochs=1)
    ends, said = ranks.ended(ranks.start(experiment, 2, tmp_path))
    assert ends == [0, 0], said
