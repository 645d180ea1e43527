"""Hostile YAML, tables and dataset records."""

import hashlib
import json

import pytest

from scalecv import config
from scalecv.errors import ConfigError, IntegrityError, ScalecvError
from scalecv.shards import manifest as manifests
from scalecv.shards.store import FACTS, LOG, open_dataset
from scalecv.sources.csv_table import csv_table
from scalecv.sources.found import LeftOut
from tests.security.conftest import CANARY

YAML = {
    "nothing": "",
    "a list": "- 1\n- 2",
    "a word": "train",
    "two documents": "name: a\n---\nname: b",
    "an alias": "name: &a x\ntask: *a",
    "a bomb of aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "an alias of itself": "a: &a [*a]",
    "a merge of an alias": "a: &a {x: 1}\nb: {<<: *a}",
    "a key twice": "name: a\nname: b",
    "a nested key twice": "train: {lr: 1, lr: 2}",
    "a list as key": "? [1, 2]\n: x",
    "a mapping as key": "? {a: 1}\n: x",
    "33 levels": "a: " + "[" * 33 + "]" * 33,
    "100,000 levels": "a: " + "[" * 100_000,
    "100,000 mappings": "a: " + "{b: " * 100_000,
    "over 1 MB": "name: " + "x" * (1 << 20),
    "python/object/apply": "a: !!python/object/apply:os.system ['touch PWNED']",
    "python/object/new": "a: !!python/object/new:os.system ['touch PWNED']",
    "python/object": f"a: !!python/object:{CANARY}.Run {{}}",
    "python/name": f"a: !!python/name:{CANARY}.run",
    "python/module": f"a: !!python/module:{CANARY}",
    "python/tuple": "a: !!python/tuple [1, 2]",
    "a tag of its own": "a: !include /etc/passwd",
    "a tag with a URI": "a: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch PWNED']",
    "a %TAG of ours": "%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system ['touch PWNED']",
    "a date that is none": "a: 2024-99-99",
    "a number of 10,000 digits": "a: " + "9" * 10_000,
    "binary that is none": "a: !!binary x",
    "a set": "a: !!set {x: , x: }",
    "a NUL": "name: a\x00b",
    "a byte order in the middle": "name: a\n\ufeffb: [",
    "tabs": "name:\n\t- a",
    "an open quote": 'name: "a',
    "an open bracket": "a: [1, 2",
    "unknown keys": "_target_: os.system\nname: a",
    "defaults of another tool": "defaults: [/etc/passwd]",
}


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_experiment_is_one_line_that_names_the_file(name, watched, tmp_path, canary):
    (tmp_path / "e.yaml").write_text(YAML[name], encoding="utf-8")
    with pytest.raises(ConfigError, match=r"e\.yaml") as refused:
        config.load(tmp_path / "e.yaml")
    assert all(len(line) < 500 for line in str(refused.value).splitlines())


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x80\x04\x95", b"name: \xc3\x28"])
def test_an_experiment_that_is_no_text_is_refused(data, watched, tmp_path):
    (tmp_path / "e.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"e\.yaml"):
        config.load(tmp_path / "e.yaml")


WORDS = ["train.lr=!!python/object/apply:os.system ['touch PWNED']", "model.arch=!!python/name:os.system", "=x", "x"]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_command_line_runs_nothing(word, watched):
    tree = {"name": "a", "task": "classify", "data": {"uri": "d"}, "model": {"arch": "resnet18"}}
    try:
        built = config.build(config.with_overrides(tree, config.parse_overrides([word])), "test")
    except ConfigError:
        return
    assert built.model.arch.startswith("!!python")  # a text, which nobody knows as a network


NAMES = [
    "../x",
    "a/b",
    "",
    ".",
    "..",
    "-x",
    "a\x00b",
    "a b",
    "a" * 101,
    "/etc",
    "~",
    "a\nb",
    "$(touch PWNED)",
    "a;b",
    7,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_would_leave_its_folder_is_refused(name, watched):
    tree = {"name": name, "task": "classify", "data": {"uri": "d"}, "model": {"arch": "resnet18"}}
    with pytest.raises(ConfigError, match="name"):
        config.build(tree, "test")


# ---- tables

PATHS = [
    "../secret.png",
    "images/../../secret.png",
    "/etc/passwd",
    "/etc/hostname.png",
    "~/secret.png",
    "file:///etc/hostname.png",
    "http://LISTENER/x.png",
    "/vsicurl/http://LISTENER/x.png",
    "s3://me:pw@LISTENER/x.png",
    "images\\..\\secret.png",
    "images/a.png\x00.txt",
    "';DROP TABLE entry;--.png",
    "$(touch PWNED).png",
    "=cmd|' /C calc'!A0.png",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_the_folder_does_not_hold_is_missing(path, watched, listener, tmp_path):
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(b"1")
    (tmp_path / "secret.png").write_bytes(b"1")
    given = path.replace("LISTENER", listener.url.removeprefix("http://"))
    (folder / "t.csv").write_text(f'file,label\nimages/a.png,x\n"{given}",y\n')
    found = [one for one in csv_table(str(folder)) if not isinstance(one, LeftOut)]
    assert [one.problem for one in found] == [None, "missing"]


@pytest.mark.parametrize(
    "text",
    ["", "\n", "label\nx\n", "file,label\n,x\n", "file\n" + "x" * 200_000, "file,file\n\x00,a\n"],
)
def test_a_table_that_is_none_is_one_error(text, watched, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    try:
        found = [one for one in csv_table(str(tmp_path)) if not isinstance(one, LeftOut)]
    except ScalecvError:
        return
    assert [one.problem for one in found] == ["missing"]


# ---- records of a dataset

GOOD = {
    "format": 1,
    "layout": "imagefolder",
    "source": "s",
    "created_at": "2026-01-01",
    "kind": "label",
    "classes": ["x"],
    "splits": {"train": 1},
    "sizes_px": [1, 1, 1, 1],
    "formats": {"PNG": 1},
    "stats": {},
    "band_counts": {"uint8x3": 1},
    "encoded_bytes": 1,
    "shards": [],
}
SHARD = {
    "path": "split=train/" + "0" * 64 + ".parquet",
    "split": "train",
    "size_bytes": 1,
    "sha256": "0" * 64,
    "row_groups": [1],
    "footer_bytes": 8,
    "byte_ranges": [[0, 1]],
}
FORGED = {
    "a shard above": {"shards": [{**SHARD, "path": "../../etc/passwd"}]},
    "a shard of another folder": {"shards": [{**SHARD, "path": "split=train/../../x.parquet"}]},
    "a shard with a URI": {"shards": [{**SHARD, "path": "http://127.0.0.1/x.parquet"}]},
    "a shard of a split of its own": {"shards": [{**SHARD, "path": "split=evil/" + "0" * 64 + ".parquet"}]},
    "a shard with sizes as text": {"shards": [{**SHARD, "size_bytes": "os:system"}]},
    "a shard with a reader": {"shards": [{**SHARD, "_target_": "os.system"}]},
    "a quarantine above": {"quarantine": {"rows": 1, "path": "../../../etc/passwd", "sha256": "0" * 64}},
    "notes with a URI": {"notes": {"rows": 1, "path": "http://127.0.0.1/x", "sha256": "0" * 64}},
    "a decoder": {"decoder": f"{CANARY}:run"},
    "classes a text": {"classes": "x"},
    "splits a list": {"splits": ["train"]},
    "no shards": {"shards": None},
    "another format": {"format": 99},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest_is_refused(name, watched, tmp_path, canary):
    tree = {**GOOD, **FORGED[name]}
    with_print = {**tree, "fingerprint": "0" * 64}
    try:
        with_print["fingerprint"] = manifests.fingerprint(manifests.Manifest.model_construct(**with_print))
    except (AttributeError, TypeError):
        pass
    data = json.dumps(with_print).encode()
    with pytest.raises(ScalecvError):
        manifests.decode(data, "manifest.json")


def commit(folder, line):
    (folder / LOG).mkdir(parents=True)
    (folder / LOG / f"{0:020d}.json").write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    return str(folder)


COMMITS = {
    "a manifest above": {"commitInfo": {"scalecv.manifest": "../secret.json", "scalecv.manifest_sha256": "0" * 64}},
    "an absolute manifest": {"commitInfo": {"scalecv.manifest": "/etc/hostname", "scalecv.manifest_sha256": "0"}},
    "a manifest with a URI": {"commitInfo": {"scalecv.manifest": "http://127.0.0.1/x", "scalecv.manifest_sha256": "0"}},
    "no sum": {"commitInfo": {"scalecv.manifest": f"{FACTS}/{'0' * 64}.json"}},
    "a manifest that is gone": {
        "commitInfo": {"scalecv.manifest": f"{FACTS}/{'0' * 64}.json", "scalecv.manifest_sha256": "0" * 64}
    },
    "a list": [1],
    "a text": "x",
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "a pickle": b"cos\nsystem\n(Vtouch PWNED\ntR.",
    "commitInfo a list": {"commitInfo": [1]},
}


@pytest.mark.parametrize("name", COMMITS)
def test_a_forged_commit_leads_nowhere(name, watched, tmp_path):
    secret = json.dumps({**GOOD, "fingerprint": "0"}).encode()
    (tmp_path / "secret.json").write_bytes(secret)
    line = COMMITS[name]
    if name == "a manifest above":
        line = {"commitInfo": {**line["commitInfo"], "scalecv.manifest_sha256": hashlib.sha256(secret).hexdigest()}}
    with pytest.raises(IntegrityError, match=r"ds"):
        open_dataset(commit(tmp_path / "ds", line))
