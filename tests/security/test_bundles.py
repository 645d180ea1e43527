"""Forged bundles, checkpoints and records: none of them decides which code runs or which file is touched."""

import hashlib
import json

import pytest
import torch

from scalecv import config, storage
from scalecv.artifacts import bundle, lookup
from scalecv.errors import ConfigError, IntegrityError, UserError
from scalecv.models import build_model
from scalecv.train import checkpoint
from scalecv.train.run import train
from tests.security import hostile
from tests.security.conftest import CANARY

SMALL = {"arch": "resnet10", "encoder": "resnet18", "in_channels": 3, "outputs": 2, "stem": "small", "norm": "batch"}
PIXELS = {
    "bands": None,
    "color": "rgb",
    "channels": 3,
    "dtype": "uint8",
    "source_dtype": "uint8",
    "size_px": 16,
    "resize": "stretch",
    "mean": (1.0, 2.0, 3.0),
    "std": (1.0, 1.0, 1.0),
}
MEMBER = {"weight": 1.0, "call": {**SMALL, "args": {"width": 4}}, "pixels": PIXELS}


@pytest.fixture(scope="module")
def good():
    """The parts of a bundle that opens."""
    model = build_model(**SMALL, args={"width": 4})
    return bundle.parts(
        model.state_dict(),
        name="a",
        task="classify",
        call={**SMALL, "args": {"width": 4}},
        pixels=PIXELS,
        classes=("x", "y"),
        data={"uri": "s3://b/d", "version": 0, "fingerprint": "f"},
    )


def put(folder, parts):
    for name, data in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


# What stands in bundle.json instead: dotted key and value.
FORGED = {
    "call.arch": [
        "os:system",
        f"{CANARY}:run",
        "torch.hub:load",
        "builtins:eval",
        "timm/hf-hub:evil/model",
        "timm/hf_hub:evil/model",
        "timm/resnet18.no_such_tag",
        "timm/../../evil",
        "../../evil",
        "http://127.0.0.1/evil",
        "quantized_resnet18/..",
        "",
        ["os", "system"],
        {"_target_": "os.system"},
        7,
        None,
    ],
    "call.args": [
        {"width": 10**9},
        {"width": -1},
        {"weights": "DEFAULT"},
        {"pretrained": True},
        {"checkpoint_path": "evil.pth"},
        {"pretrained_cfg": "hf-hub:evil/model"},
        {"pretrained_cfg_overlay": "x"},
        {"cache_dir": "/tmp/evil"},
        {"_target_": "os.system"},
        {"class_path": f"{CANARY}.run"},
        {"norm_layer": "os.system"},
        {"width": {"_component_": "os.system"}},
        ["os.system"],
        "os.system",
    ],
    "call.in_channels": [0, -1, 10**9, "three", None],
    "call.outputs": [0, 10**12, 3, 5],
    "call.stem": ["os:system", "big"],
    "call.norm": ["os:system", None],
    "call._target_": ["os.system"],
    "custom_imports": [[CANARY]],
    "auto_map": [{"AutoModel": f"{CANARY}.run"}],
    "task": [f"{CANARY}:run", "detect", None],
    "format": [0, 2, "1", None, [1]],
    "classes": ["xy", [1, 2], {"x": "y"}, None],
    "weights_bytes": [-1, 0, 10**12, "many"],
    "weights_sha256": ["0" * 64, "", None],
    "pixels.size_px": [10**6, 0, -1, "large"],
    "pixels.channels": [4, 0, 10**9],
    "pixels.mean": [[1.0], [], "mean", [None, None, None]],
    "pixels.std": [[float("nan")] * 3, [float("inf")] * 3],
    "pixels.resize": ["os:system"],
    "metrics": [{"a": float("nan")}, [1]],
    "data.version": ["new", 1.5],
    "epoch": [-1],
    "members": [
        [{}],
        [MEMBER | {"weight": 0.5}],
        [MEMBER | {"weight": -1}],
        [MEMBER | {"weight": float("nan")}],
        [MEMBER | {"call": MEMBER["call"] | {"arch": f"{CANARY}:run"}}],
        [MEMBER | {"call": MEMBER["call"] | {"args": {"width": 10**9}}}],
        [MEMBER | {"scale": [1e-9, 1e9]}],
        [MEMBER | {"pixels": PIXELS | {"bands": [1, 2, 7]}}],
        [MEMBER | {"_target_": "os.system"}],
        [MEMBER | {"weight": 1 / 65}] * 65,
        MEMBER,
    ],
    "origins": [[{"name": "a"}], "a"],
}
CASES = [(key, value) for key, values in FORGED.items() for value in values]


@pytest.mark.parametrize("key, value", CASES, ids=[f"{k}={str(v)[:40]}" for k, v in CASES])
def test_a_forged_description_is_refused(key, value, good, watched, tmp_path, canary):
    tree = json.loads(good[bundle.FACTS])
    node = tree
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    node[last] = value
    folder = put(tmp_path / "b", {**good, bundle.FACTS: json.dumps(tree).encode()})
    with pytest.raises((UserError, IntegrityError)) as refused:
        bundle.open_bundle(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.filterwarnings("ignore:`timm-` encoders")
@pytest.mark.parametrize(
    "encoder", ["tu-hf-hub:evil/x", "timm-evil", "../../evil", "os:system", "tu-", "tu-resnet18.evil", 7]
)
def test_a_forged_encoder_is_refused(encoder, good, watched, tmp_path):
    tree = json.loads(good[bundle.FACTS])
    tree["call"] |= {"arch": "unet", "encoder": encoder, "stem": "default"}
    with pytest.raises((UserError, IntegrityError)):
        bundle.open_bundle(put(tmp_path / "b", {**good, bundle.FACTS: json.dumps(tree).encode()}))


DESCRIPTIONS = {
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "cut": b'{"format": 1, "name": ',
    "deep": b'{"format": 1, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "17 MB": b" " * (17 << 20) + b"{}",
    "a pickle": hostile.pickle_cases()["os.system, not zipped"],
    "YAML": b"!!python/object/apply:os.system ['touch PWNED']",
    "not UTF-8": b'{"format": 1, "name": "\xff\xfe"}',
    "a number of 10,000 digits": b'{"format": 1, "epoch": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_is_no_description_is_refused(name, good, watched, tmp_path):
    with pytest.raises((UserError, IntegrityError)):
        bundle.open_bundle(put(tmp_path / "b", {**good, bundle.FACTS: DESCRIPTIONS[name]}))


@pytest.mark.parametrize("name", ["a pickle", "overlapping", "a name twice", "a hole", "nothing"])
def test_weights_whose_sums_are_forged_too_are_refused(name, good, watched, tmp_path):
    data = hostile.safetensors_cases()[name]
    tree = json.loads(good[bundle.FACTS])
    tree |= {"weights_bytes": len(data), "weights_sha256": hashlib.sha256(data).hexdigest()}
    parts = {bundle.FACTS: json.dumps(tree).encode(), bundle.WEIGHTS: data}
    with pytest.raises(IntegrityError):
        bundle.open_bundle(put(tmp_path / "b", parts))


def test_weights_that_are_gone_are_named(good, watched, tmp_path):
    with pytest.raises(IntegrityError, match="is missing: the bundle is not whole"):
        bundle.open_bundle(put(tmp_path / "b", {bundle.FACTS: good[bundle.FACTS]}))


def test_it_opens_where_nothing_is_forged(good, watched, tmp_path):
    assert bundle.open_bundle(put(tmp_path / "b", good)).facts.name == "a"


# ---- checkpoints: the manifest, and what it leads to

MANIFESTS = {
    "parts a list": {"parts": ["model.safetensors"]},
    "no parts": {"parts": None},
    "a part above": {"parts": {"../../../victim": {"sha256": "0" * 64, "size_bytes": 6}}},
    "an absolute part": {"parts": {"/etc/passwd": {"sha256": "0" * 64, "size_bytes": 6}}},
    "a part on another store": {"parts": {"http://127.0.0.1/x": {"sha256": "0" * 64, "size_bytes": 6}}},
    "sizes as text": {"parts": {"a": {"sha256": "0" * 64, "size_bytes": "os:system"}}},
    "sums as numbers": {"parts": {"a": {"sha256": 7, "size_bytes": 6}}},
    "no sums": {"parts": {"a": {}}},
    "updates as text": {"updates": "os:system"},
    "metric as a list": {"metric": [1]},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_forged_manifest_counts_as_damaged_and_deletes_nothing(name, watched, tmp_path):
    (tmp_path / "victim").write_bytes(b"victim")
    run = str(tmp_path / "run")
    kept = [checkpoint.save(run, {"a": b"a%d" % n}, n, 0.5) for n in range(1, 4)]
    forged = {"format": checkpoint.FORMAT, "updates": 2, "metric": 0.5, "parts": {}, **MANIFESTS[name]}
    data = json.dumps(forged).encode()
    place = storage.join(run, "checkpoints", f"{2:08d}-{hashlib.sha256(data).hexdigest()[:8]}")
    storage.put(storage.join(place, checkpoint.MANIFEST), data)
    found, parts, skipped = checkpoint.newest(run)
    assert found and found.uri == kept[-1].uri and parts == {"a": b"a3"}
    assert any(place in reason for reason in skipped)
    checkpoint.collect(run, keep=1)
    assert (tmp_path / "victim").read_bytes() == b"victim"


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"[" * 100_000, b"\x80\x04.", b'{"format": 2}'])
def test_a_manifest_of_other_bytes_counts_as_damaged(data, watched, tmp_path):
    run = str(tmp_path / "run")
    saved = checkpoint.save(run, {"a": b"a"}, 1, None)
    storage.put(storage.join(run, "checkpoints", "00000002-" + "0" * 8, checkpoint.MANIFEST), data)
    found, _, skipped = checkpoint.newest(run)
    assert found and found.uri == saved.uri and len(skipped) == 1


def test_no_number_of_an_optimiser_comes_out_of_a_pickle(watched):
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(Exception, match="deserializing"):
        checkpoint.unpack_optimizer(optimizer, hostile.pickle_cases()["os.system"])


# ---- records of MLflow

RECORDED = ["os:system", f"{CANARY}:run", "timm/hf-hub:evil/x"]


@pytest.mark.parametrize("arch", RECORDED)
def test_an_experiment_out_of_a_record_imports_nothing(arch, watched, tmp_path, canary):
    tree = {"name": "a", "task": "classify", "data": {"uri": "ds"}, "model": {"arch": arch}}
    recorded = config.dump(config.build(tree, "test"))
    with pytest.raises(ConfigError, match="comes from a record and would import code"):
        train(config.build(config.parse_yaml(recorded, "runs:/1"), "runs:/1"), allow_import=False)


def test_the_place_that_a_record_names_is_only_looked_at_through_the_one_door(watched, listener, tmp_path):
    places = [f"{listener.url}/b", "ftp://h/b", f"/vsicurl/{listener.url}/b", "s3://u:p@b/x", "hf://evil/b", "\x00"]
    assert [lookup._is_bundle(place) for place in places] == [False] * len(places)


@pytest.mark.parametrize("run", ["../1", "a b", "http://127.0.0.1/x", "'; DROP TABLE runs", "x" * 65])
def test_what_is_no_run_is_refused_before_anybody_is_asked(run, watched):
    with pytest.raises(UserError, match="is not a run"):
        lookup._run_id(f"runs:/{run}")
