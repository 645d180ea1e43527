"""The experiment tree: overrides, origins, and one clear line for each mistake."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalecv import config
from scalecv.errors import ConfigError

GOOD = {"name": "a", "task": "classify", "data": {"uri": "d"}, "model": {"arch": "resnet18"}}
ROOT = Path(__file__).parents[1]


def changed(**dotted):
    return config.build(config.with_overrides(GOOD, {k.replace("__", "."): v for k, v in dotted.items()}), "e.yaml")


def test_defaults_and_overrides():
    assert changed().train.epochs == 10
    assert changed(train__lr="3e-4").train.lr == 3e-4
    assert config.parse_overrides(["train.lr=3e-4", "data.bands=[1,2]", "data.get="]) == {
        "train.lr": "3e-4",
        "data.bands": [1, 2],
        "data.get": None,
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"train.learning_rate": 3}, ["unknown key 'train.learning_rate'; did you mean 'train.lr'"]),
        ({"train.batchs": 3}, ["unknown key 'train.batchs'", "did you mean 'train.batch'"]),
        ({"train.weights": 3}, ["unknown key 'train.weights'"]),
        ({"lr": 3}, ["unknown key 'lr'", "train.lr"]),
        ({"task": "clasify"}, ["task='clasify'", "'classify', 'segment' or 'upscale'"]),
        ({"train.batch": "many"}, ["train.batch='many'", "integer"]),
        ({"train.batch": 7, "scale.workers": 2}, ["train.batch=7", "scale.workers=2", "6 or 8"]),
        ({"train.batch": 64, "train.micro_batch": 5}, ["train.micro_batch=5", "64 images"]),
        ({"train.lr": 0}, ["train.lr=0", "greater than 0"]),
        ({"train.lr": float("nan")}, ["train.lr", "finite"]),
        ({"name": "a/b"}, ["name='a/b'"]),
        ({"data.bands": [0, 1]}, ["data.bands", "counted from 1"]),
        ({"data.augment.resized_crop": [0.5, 1.0]}, ["data.augment.resized_crop needs data.size_px"]),
        ({"data.augment.hflip": 2}, ["data.augment.hflip=2"]),
        ({"loss.dise": 1}, ["unknown key 'loss.dise'", "loss.dice"]),
    ],
)
def test_a_mistake_is_named_with_its_key(override, words):
    with pytest.raises(ConfigError) as said:
        config.build(config.with_overrides(GOOD, override), "e.yaml")
    assert all(word in str(said.value) for word in ["e.yaml", *words]), said.value


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("- 1", "expected keys"),
        ("a: 1\na: 2", "stands twice"),
        ("a: &x 1\nb: *x", "aliases"),
        ("", "expected keys"),
        ("x" * (2 << 20), "at most"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path, text, word):
    file = tmp_path / "e.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=word):
        config.load(file)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "gtsrb.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"did you mean 'gtsrb.yaml'"):
        config.load(tmp_path / "gtrsb.yaml")


def test_missing_keys_are_listed_at_once():
    with pytest.raises(ConfigError) as said:
        config.build({"name": "a"}, "e.yaml")
    assert str(said.value).count("is missing") == 3


def test_the_space_of_a_search_is_set_like_any_key():
    given = {"search.space.train.lr.uniform": [1e-4, 1e-2], "search.space.model.norm": {"choice": ["group", "batch"]}}
    base = config.build(config.with_overrides(GOOD, given), "test")
    assert base.search.space["train.lr"].uniform == (1e-4, 1e-2)
    assert base.search.space["model.norm"].choice == ("group", "batch")
    assert "null" not in config.dump(base).partition("space:")[2].partition("trials:")[0]
    assert config.build(config.parse_yaml(config.dump(base), "dump"), "test") == base


def test_ctrl_c_before_anything_began_is_told(tmp_path):
    os.mkfifo(tmp_path / "experiment.yaml")  # is waited for
    call = [sys.executable, "-m", "scalecv", "tune", str(tmp_path / "experiment.yaml")]
    # Whoever runs the tests in the background of a script has them ignore it.
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    job = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    with open(tmp_path / "experiment.yaml", "w"):  # once it reads
        job.send_signal(signal.SIGINT)
        said = job.communicate(timeout=60)[1]
    assert (job.returncode, said) == (75, "scalecv: stopped\n")


def test_override_through_a_value_is_refused():
    with pytest.raises(ConfigError, match="'name' is a value"):
        config.with_overrides(GOOD, {"name.x": 1})
    with pytest.raises(ConfigError, match="not key=value"):
        config.parse_overrides(["train.lr"])


def test_origins(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(json.dumps(GOOD))
    found = {key: (value, origin) for key, value, origin in config.origins(file, {"train.lr": 0.5})}
    assert found["train.lr"] == (0.5, "command line")
    assert found["model.arch"] == ("resnet18", str(file))
    assert found["train.batch"] == (64, "default")


def test_identity_ignores_where_and_how_long():
    same = changed(train__epochs=99, scale__workers=2, track__storage="s3://b/x", data__uri="s3://b/d")
    assert same.identity() == changed().identity()
    assert changed(train__lr=0.5).identity() != changed().identity()
    assert changed(seed=1).identity() != changed().identity()


def test_round_trip():
    experiment = changed(train__clip_norm=1.5, data__bands=[3, 1], loss__dice=0.25)
    assert config.build(config.parse_yaml(config.dump(experiment), "x"), "x") == experiment


@given(st.dictionaries(st.text(min_size=1), st.one_of(st.none(), st.integers(), st.text(), st.floats(), st.booleans())))
def test_any_mapping_is_accepted_or_refused_in_words(tree):
    try:
        config.build(tree, "e.yaml")
    except ConfigError as error:
        assert "e.yaml" in str(error)


def test_shipped_schema_is_current():
    """`scalecv schema > experiments/schema.json` was run after the last change of a key."""
    assert json.loads((ROOT / "experiments/schema.json").read_text()) == config.json_schema()


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("search_*.yaml")), ids=lambda p: p.name)
def test_the_networks_that_a_shipped_search_chooses_from_are_there(file):
    from scalecv.train.checks import check_names

    experiment = config.load(file)
    tree = experiment.model_dump(mode="json", exclude={"search"})
    for key in ("model.arch", "model.encoder"):
        for value in experiment.search.space[key].choice if key in experiment.search.space else ():
            check_names(config.build(config.with_overrides(tree, {key: value}), file.name))


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_experiments_are_valid(file):
    experiment = config.load(file)
    assert experiment.question
    assert experiment.data.get


def test_a_named_loss_gives_its_keys_and_each_can_be_set(tmp_path):
    loss = config.Loss(name="bce_focal_neg_iou", pos_weight=30.0, dice=0.2)
    assert loss.terms() == {"bce": 0.3, "dice": 0.2, "pos_neg_iou": 0.4, "focal": 0.3}
    assert (loss.pos_weight, loss.neg_weight, loss.focal_gamma, loss.focal_alpha) == (30.0, 1.0, 2.0, None)
    assert config.Loss.model_validate(loss.model_dump()) == loss
    assert config.Loss().terms() == {} and config.Loss(bce=0.5).pos_weight == 1.0
    with pytest.raises(ValueError, match="every term of it has weight 0"):
        config.Loss(**{**config.Loss().model_dump(), "name": "bce_focal_neg_iou"})
    file = tmp_path / "e.yaml"
    file.write_text("name: a\ntask: segment\ndata: {uri: d}\nmodel: {arch: unet}\nloss: {name: bce_focal_neg_iou}\n")
    told = {key: (value, origin) for key, value, origin in config.origins(file, {"loss.bce": 0.5})}
    assert told["loss.bce"] == (0.5, "command line") and told["loss.focal"] == (0.3, "loss.name")


@pytest.mark.parametrize(
    "key", ["train.threshold=0.4", "train.threshold=tuned", "loss.class_weights=balanced", "loss.label_smoothing=0.1"]
)
def test_what_needs_classes_is_refused_for_upscale(key):
    tree = {"name": "larger", "task": "upscale", "data.uri": "data", "model.arch": "espcn"}
    config.build(config.with_overrides({}, tree), "test")
    with pytest.raises(ConfigError, match=f"{key.partition('=')[0]} is for tasks that tell classes apart"):
        config.build(config.with_overrides({}, tree | config.parse_overrides([key])), "test")
