"""Twelve secrets are planted where people leave them; none of them is found in anything that a run leaves."""

import base64
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from scalecv import redact
from scalecv.artifacts import spool
from scalecv.errors import ConfigError
from scalecv.staging import stage
from tests import make
from tests.servers import empty_store

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "plantedAws/Secret+Key0123456789abcdef",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-pässword",
    "RAY_AUTH_TOKEN": "planted0ray0token0planted0ray0token0",
    "HF_TOKEN": "hf_plantedPlantedPlantedPlantedPlanted",
    "DATABASE_PASSWORD": 'planted"data"base"',
}
LOGIN = "planted-url-login"
SIGNATURE = "plantedsignature0123456789abcdef"
SAS = "plantedSas%2BAbc%3D"
KNOWN = "ghp_plantedPlantedPlantedPlantedPlanted1"
BEARER = "planted.bearer.0123456789"
PRIVATE = "plantedMIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
AZURE = "plantedAzureAccountKey0123456789=="
URLS = [
    f"https://me:{LOGIN}@host.example/x",
    f"https://b.s3.amazonaws.com/k?X-Amz-Credential=a&X-Amz-Signature={SIGNATURE}",
    f"https://a.blob.core.windows.net/c/b?sv=2024&sig={SAS}&se=2026",
]
TWELVE = [*PLANTED.values(), LOGIN, SIGNATURE, SAS, KNOWN, BEARER, PRIVATE, AZURE]
TEXT = " ".join(
    [
        *PLANTED.values(),
        *URLS,
        KNOWN,
        f"Authorization: Bearer {BEARER}",
        f"-----BEGIN PRIVATE KEY-----\n{PRIVATE}\n-----END PRIVATE KEY-----",
        f"DefaultEndpointsProtocol=https;AccountKey={AZURE};EndpointSuffix=core.windows.net",
    ]
)


def forms(secret):
    """How a secret may stand in a file."""
    plain = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    return {f.encode() for f in plain} | {base64.b64encode(secret.encode()).rstrip(b"=")[:-2]}


def found_in(data: bytes):
    return [secret[:12] for secret in TWELVE for form in forms(secret) if form in data]


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def test_twelve_are_cleaned_out_of_a_text_and_the_words_around_them_stay(planted):
    assert len(set(TWELVE)) == 12
    text = f"use_cls_token=true {TEXT} tokenizer key=value monkey https://host/x?page=2&key_word=a a@b.c"
    cleaned = redact.clean(text)
    assert found_in(cleaned.encode()) == []
    for kept in ("use_cls_token=true", "tokenizer key=value monkey", "https://host/x?page=2&key_word=a a@b.c"):
        assert kept in cleaned
    assert redact.clean(cleaned) == cleaned
    assert found_in(json.dumps(redact.clean_tree({TEXT: [TEXT, {"a": (TEXT, 1.5, None)}]})).encode()) == []


@pytest.mark.parametrize(
    "name, is_secret",
    [
        *[(name, True) for name in PLANTED],
        *[
            (n, True)
            for n in ("PGPASSWORD", "AZURE_STORAGE_CONNECTION_STRING", "WANDB_API_KEY", "MY_PAT", "aws_secret")
        ],
        *[(n, False) for n in ("PATH", "PWD", "HOME", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")],
        *[(n, False) for n in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "AWS_REGION", "CUDA_VISIBLE_DEVICES")],
    ],
)
def test_the_name_of_a_variable_decides_whether_its_value_is_secret(name, is_secret):
    assert redact.is_secret_name(name) is is_secret


def test_short_values_and_paths_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", "token")
    monkeypatch.setenv("B_SECRET", str(tmp_path))
    assert redact.clean(f"token {tmp_path}") == f"token {tmp_path}" and redact.variable_in(str(tmp_path)) is None


def test_the_spool_lets_none_pass_and_keeps_what_is_none(planted, tmp_path):
    path = tmp_path / "s"
    spool.append(path, {"kind": "params", "params": {"a": TEXT, "model.args.use_cls_token": True, TEXT: 1}})
    spool.append(path, {"kind": "text", "text": TEXT, "file": "code.diff"})
    spool.append(path, {"kind": "progress", "message": ValueError(TEXT)})
    assert found_in(path.read_bytes()) == []
    assert spool.read(path)[0][0]["params"]["model.args.use_cls_token"] is True


def test_a_job_takes_none_along_unasked(planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    experiment = "name: a\ntask: classify\ndata: {uri: ds}\nmodel: {arch: resnet18}\n"
    (tmp_path / "e.yaml").write_text(experiment)
    staged = stage(["train", "e.yaml"], [], tmp_path / "job", same_machine=True)
    assert found_in(repr(staged).encode()) == []
    with pytest.raises(ConfigError, match=r"question=… holds the value of HF_TOKEN") as refused:
        stage(["train", "e.yaml", f"question={PLANTED['HF_TOKEN']}"], [], tmp_path / "job", same_machine=True)
    assert found_in(str(refused.value).encode()) == []
    (tmp_path / "mine.py").write_text(f"KEY = '{PLANTED['AWS_SECRET_ACCESS_KEY']}'\n")
    with pytest.raises(ConfigError, match=r"mine.py holds the value of AWS_SECRET_ACCESS_KEY"):
        stage(["train", "e.yaml"], [], tmp_path / "job", same_machine=True)


NETWORK = """
import os, logging, sys
from torch import nn

def net(in_channels, outputs, fails=False, use_cls_token=False):
    logging.getLogger("mine").warning("log %s", os.environ["PLANTED_TEXT"])
    print("print", os.environ["PLANTED_TEXT"]); print("err", os.environ["PLANTED_TEXT"], file=sys.stderr)
    if fails:
        raise OSError("cannot open " + os.environ["PLANTED_TEXT"])
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))
"""


@pytest.mark.e2e
def test_train_and_evaluate_leave_none_of_them_anywhere(tmp_path, monkeypatch):
    """The verbs as a user starts them, on SQLite and in a git repository whose diff holds all twelve."""
    from scalecv.shards.ingest import IngestOptions, ingest

    make.shapes(tmp_path / "images")
    ingest(IngestOptions(source=str(tmp_path / "images"), to=str(tmp_path / "ds"), layout="imagefolder", concurrency=0))
    work = tmp_path / "work"
    work.mkdir()
    empty_store(work / "mlruns.db")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (work / "notes.txt").write_text("one\n")
    for words in (["init", "-q"], ["add", "notes.txt"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True, cwd=work)
    (work / "notes.txt").write_text(TEXT + "\n")
    (work / "mine.py").write_text(NETWORK)
    question = json.dumps(f"does {TEXT} help?")
    (work / "e.yaml").write_text(
        f"name: planted\ntask: classify\nquestion: {question}\ndata: {{uri: {tmp_path}/ds, get: {question}}}\n"
        "model: {arch: 'mine:net', args: {use_cls_token: true}}\ntrain: {epochs: 1, batch: 16}\nscale: {workers: 0}\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    environment |= {**PLANTED, "PLANTED_TEXT": TEXT, "XDG_CACHE_HOME": str(work / "cache"), "HOME": str(work)}

    def scalecv(*words):
        command = [sys.executable, "-m", "scalecv", *words]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, timeout=300)
        assert found_in(done.stdout) == [] and found_in(done.stderr) == [], words
        return done

    done = scalecv("train", "e.yaml", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert b"log " in done.stderr and b"[secret]" in done.stderr
    assert scalecv("evaluate", result["bundle"], f"{tmp_path}/ds", "--allow-import", "--json").returncode == 0
    failed = scalecv("train", "e.yaml", "name=fails", "model.args.fails=true")
    assert failed.returncode in (1, 2) and b"cannot open" in failed.stderr, failed.stderr
    assert scalecv("train", "e.yaml", "name=args", f"model.args.note={PLANTED['HF_TOKEN']}").returncode == 2
    assert scalecv("train", "e.yaml", "name=uri", f"data.uri=s3://me:{LOGIN}@b/x?sig={SAS}").returncode == 2
    assert scalecv("config", "e.yaml", "--json").returncode == 0
    assert scalecv("doctor", f"s3://me:{LOGIN}@b/x").returncode == 1

    planted_by_us = {work / "notes.txt", work / "e.yaml"}
    looked_at = [p for p in work.rglob("*") if p.is_file() and p not in planted_by_us and ".git" not in p.parts]
    names = {p.name for p in looked_at}
    assert {"run.json", "spool.jsonl", "spool.sent.json", "result.json", "bundle.json", "manifest.json"} <= names
    assert {"mlruns.db", "experiment.yaml", "code.diff"} <= names
    hits = {str(p.relative_to(work)): found for p in looked_at if (found := found_in(p.read_bytes()))}
    assert hits == {}
    with sqlite3.connect(work / "mlruns.db") as store:
        params = dict(store.execute("SELECT key, value FROM params"))
    assert params["model.args.use_cls_token"] == "true"
    diff = next(p for p in looked_at if p.name == "code.diff").read_text()
    assert "[secret]" in diff and "-one" in diff
