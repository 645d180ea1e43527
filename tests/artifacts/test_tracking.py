import contextlib
import http.client
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalecv.artifacts import spool, tracking
from scalecv.artifacts.mlflow_client import client
from scalecv.errors import ConfigError, UserError
from tests.servers import empty_store, free_port, mlflow_on_postgresql, mlflow_server  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A SQLite store in a folder with a space."""
    return empty_store(tmp_path_factory.mktemp("with space") / "mlruns.db")


@pytest.fixture
def run(tmp_path, store):
    """Makes senders of one run; closes what a test leaves open."""
    made = []

    def start(key="k", uri=store, name="a", state="spool.sent.json", tags=None):
        path = tmp_path / "spool.jsonl"
        made.append(tracking.Sender(path, tmp_path / state, uri, "tests", name, f"{tmp_path}-{key}", tags))
        return made[-1], path

    yield start
    for sender in made:
        sender.close(0.1)


def metrics(path, steps, key="train/loss", scale=1.0):
    for step in steps:
        spool.append(path, {"kind": "metrics", "step": step, "metrics": {key: scale / (step + 1)}})


def history(uri, run_id, key="train/loss"):
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, key)]


def png(path, color=(200, 30, 30), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return str(path)


# ---- the URI


def test_the_uri_comes_from_the_key_then_the_variable_then_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(None) == f"sqlite:///{tmp_path}/mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:5000/")
    assert tracking.tracking_uri(None) == "http://h:5000"
    assert tracking.tracking_uri("sqlite:///here.db") == f"sqlite:///{tmp_path}/here.db"
    assert tracking.tracking_uri("sqlite:////x/y.db") == "sqlite:////x/y.db"


@pytest.mark.parametrize(
    "uri, says",
    [
        ("mlruns", "sqlite:///"),
        ("file:///x/mlruns", "sqlite:///"),
        ("htp://h:5000", "did you mean 'http'"),
        ("sqlite://", "names no file"),
        ("http://", "no host"),
        ("ftp://user:secret@h/x", "unknown scheme"),
    ],
)
def test_a_wrong_uri_is_one_clear_error(uri, says):
    with pytest.raises(ConfigError) as raised:
        tracking.tracking_uri(uri)
    assert says in str(raised.value) and "secret" not in str(raised.value)


# ---- sending


def test_everything_of_a_run_arrives(run, store, tmp_path):
    sender, path = run(tags={"scalecv.task": "classify"})
    spool.append(
        path, {"kind": "params", "params": {"train.lr": 0.1, "data.uri": "s3://u:pw@b/x?X-Sig=abc", "a": None}}
    )
    spool.append(path, {"kind": "tags", "tags": {"note": "from https://me:hidden@host/x"}})
    metrics(path, range(3))
    spool.append(path, {"kind": "text", "text": "name: a\n", "file": "experiment.yaml"})
    spool.append(path, {"kind": "artifact", "uri": png(tmp_path / "curve.png"), "folder": "pictures"})
    spool.append(path, {"kind": "image", "uri": png(tmp_path / "p.png"), "key": "val/predictions", "step": 3})
    dataset = {"uri": "s3://b/d", "version": 2, "digest": "f" * 64, "context": "train"}
    spool.append(path, {"kind": "dataset", "name": "d", **dataset})
    spool.append(path, {"kind": "progress", "message": "not for MLflow"})
    spool.append(path, {"kind": "end", "status": "FINISHED"})
    assert sender.close(60)
    ml = client(store)
    found = ml.get_run(sender.run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == "a"
    assert found.data.params == {"train.lr": "0.1", "data.uri": "s3://b/x", "a": "null"}
    assert found.data.tags["scalecv.task"] == "classify"
    assert found.data.tags["note"] == "from https://host/x"
    assert history(store, sender.run_id) == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert [a.path for a in ml.list_artifacts(sender.run_id, "pictures")] == ["pictures/curve.png"]
    images = [a.path for a in ml.list_artifacts(sender.run_id, "images")]
    assert len(images) == 2 and all(p.startswith("images/val~predictions+step+3+timestamp+") for p in images)
    given = found.inputs.dataset_inputs[0]
    assert given.dataset.name == "d" and given.dataset.digest == "f" * 36
    assert [(t.key, t.value) for t in given.tags] == [("mlflow.data.context", "train")]
    assert tracking.resolved_experiment(f"runs:/{sender.run_id}", store) == "name: a\n"
    # Beside the database, whatever the working directory is.
    assert Path(store.partition("///")[2]).parent.joinpath("mlartifacts").is_dir()


def test_a_restart_goes_on_with_the_same_run_and_repeats_nothing(run, store):
    sender, path = run()
    metrics(path, range(5))
    assert sender.close(60)
    # The training starts again from step 3 and writes later times.
    time.sleep(0.01)
    metrics(path, range(3, 8))
    again, _ = run()
    assert again.close(60) and again.run_id == sender.run_id
    assert [step for step, _ in history(store, again.run_id)] == list(range(8))


def test_without_its_state_nothing_is_doubled(run, store, tmp_path):
    sender, path = run()
    metrics(path, range(5))
    spool.append(path, {"kind": "image", "uri": png(tmp_path / "p.png"), "key": "k", "step": 1})
    assert sender.close(60)
    (tmp_path / "spool.sent.json").unlink()
    metrics(path, range(5, 7))
    again, _ = run()
    assert again.close(60) and again.run_id == sender.run_id
    assert [step for step, _ in history(store, again.run_id)] == list(range(7))
    assert len(client(store).list_artifacts(again.run_id, "images")) == 2


def test_on_another_machine_repeated_steps_are_known_from_the_server(run, store, tmp_path):
    sender, path = run()
    metrics(path, range(5))
    assert sender.close(60)
    path.unlink()
    (tmp_path / "spool.sent.json").unlink()
    time.sleep(0.01)
    metrics(path, range(2, 7))
    again, _ = run()
    assert again.close(60)
    assert [step for step, _ in history(store, again.run_id)] == list(range(7))


def test_the_same_point_twice_is_one_point_in_mlflow(store):
    from mlflow.entities import Metric

    ml = client(store)
    made = ml.create_run(ml.create_experiment("twice"))
    batch = [Metric("m", 0.1 * step, 1000 + step, step) for step in range(10)]
    ml.log_batch(made.info.run_id, metrics=batch)
    ml.log_batch(made.info.run_id, metrics=[*batch, Metric("m", 7.0, 2000, 10)])
    assert len(ml.get_metric_history(made.info.run_id, "m")) == 11


def test_a_finished_run_is_opened_again_and_ended_again(run, store):
    sender, path = run()
    spool.append(path, {"kind": "params", "params": {"train.epochs": 1}})
    spool.append(path, {"kind": "end", "status": "FINISHED"})
    assert sender.close(60)
    again, _ = run()
    spool.append(path, {"kind": "params", "params": {"train.epochs": 2}})
    metrics(path, [1])
    ends = time.monotonic() + 60
    while client(store).get_run(sender.run_id).info.status != "RUNNING":
        assert time.monotonic() < ends
        time.sleep(0.1)
    spool.append(path, {"kind": "end", "status": "KILLED"})
    assert again.close(60)
    found = client(store).get_run(sender.run_id)
    assert found.info.status == "KILLED" and found.data.params["train.epochs"] == "1"
    assert found.data.tags["scalecv.now.train.epochs"] == "2"


def test_what_mlflow_refuses_is_left_out_and_the_rest_arrives(run, store, caplog, tmp_path):
    sender, path = run()
    with caplog.at_level(logging.WARNING):
        spool.append(path, {"kind": "metrics", "step": 1, "metrics": {"../up": 1.0, "val/iou schild ä (1)": 0.5}})
        spool.append(path, {"kind": "artifact", "uri": str(tmp_path / "gone.png"), "folder": "pictures"})
        (tmp_path / "bad.png").write_bytes(b"<html>")
        spool.append(path, {"kind": "image", "uri": str(tmp_path / "bad.png"), "key": "k", "step": 1})
        metrics(path, [2])
        assert sender.close(60)
    found = client(store).get_run(sender.run_id).data.metrics
    assert found == {"val/iou schild ä _1_": 0.5, "train/loss": 1 / 3}
    assert "../up" in caplog.text and "gone.png" in caplog.text and "bad.png" in caplog.text


def test_ten_thousand_points_arrive_in_full_batches(run, store):
    sender, path = run()
    lines = [
        {"kind": "metrics", "step": s, "time_ms": 1_700_000_000_000 + s, "metrics": {"m": s}} for s in range(10_000)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sender.close(60)
    found = client(store).get_metric_history(sender.run_id, "m")
    assert [p.step for p in found] == list(range(10_000))


def test_a_parent_and_its_child(run, store, tmp_path):
    parent, _ = run("parent")
    assert parent.close(30)
    parent_id = parent.run_id
    child = tracking.Sender(
        tmp_path / "c", tmp_path / "c.sent.json", store, "tests", "t1", "child", {"mlflow.parentRunId": parent_id}
    )
    assert child.close(30)
    assert client(store).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent_id


def test_two_processes_make_the_tables_at_the_same_time(tmp_path):
    uri = f"sqlite:///{tmp_path}/new.db"
    code = (
        "import sys; from scalecv.artifacts import spool, tracking\n"
        "who = sys.argv[2]; path = sys.argv[3] + who\n"
        "spool.append(path, {'kind': 'metrics', 'step': 1, 'metrics': {'m': 1}})\n"
        "s = tracking.Sender(path, path + '.sent.json', sys.argv[1], 'e', who, who); print(s.close(200), s.run_id)"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, who, f"{tmp_path}/s"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in ("one", "two")
    ]
    said = [p.communicate(timeout=300) for p in both]
    assert all(out.startswith("True ") and err == "" for out, err in said), said
    assert len(client(uri).search_runs(["1"])) == 2


# ---- MLflow away


def test_a_dead_server_neither_stops_nor_slows_the_caller(run, caplog):
    with caplog.at_level(logging.WARNING, "scalecv.tracking"):
        began = time.monotonic()
        sender, path = run(uri=f"http://127.0.0.1:{free_port()}")
        metrics(path, range(100))
        assert time.monotonic() - began < 3  # one call of MLflow's own would block for 247 s
        began = time.monotonic()
        assert not sender.close(6)
        assert time.monotonic() - began < 20
    assert "100 points" in sender.waiting() and str(path) in sender.waiting() and "scalecv sync" in sender.waiting()
    assert caplog.text.count("takes nothing now") == 1 and sender.run_id is None


def test_a_probe_says_why_there_is_no_answer(tmp_path):
    nobody = tracking.probe(f"http://u:secret@127.0.0.1:{free_port()}")
    assert "does not answer" in nobody and "secret" not in nobody
    with pytest.raises(ConfigError):
        tracking.probe("htp://x")
    assert tracking.probe(f"sqlite:///{tmp_path}/x/new.db") is None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert "does not answer" in tracking.probe(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=1)
        assert time.monotonic() - began < 10


class CutAnswers:
    """A proxy that passes requests on, and loses two answers in five, drawn with a fixed seed."""

    def __init__(self, to_port):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port, self.to_port, self.count = self.server.getsockname()[1], to_port, 0
        self.draw = random.Random(7)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._passed_on, args=(near,), daemon=True).start()

    def _passed_on(self, near):
        with contextlib.suppress(OSError):
            self._one(near)

    def _one(self, near):
        head = b""
        with near:
            while b"\r\n\r\n" not in head:
                got = near.recv(65536)
                if not got:
                    return
                head += got
            start, _, body = head.partition(b"\r\n\r\n")
            lines = start.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:])
            length = int(next((v for k, v in headers.items() if k.lower() == "content-length"), 0))
            while len(body) < length:
                body += near.recv(65536)
            method, path, _ = lines[0].split(" ")
            far = http.client.HTTPConnection("127.0.0.1", self.to_port, timeout=30)
            headers["Host"] = f"127.0.0.1:{self.to_port}"
            far.request(method, path, body, headers)
            answer = far.getresponse()
            data = answer.read()
            self.count += 1
            if self.draw.random() < 0.4:
                return  # done, but nobody hears of it
            near.sendall(f"HTTP/1.1 {answer.status} x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n".encode())
            near.sendall(f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode() + data)


@pytest.mark.chaos
@pytest.mark.parametrize("store", ["mlflow_server", "mlflow_on_postgresql"])
def test_answers_lost_then_the_server_killed_and_back(run, store, tmp_path, monkeypatch, request):
    server = request.getfixturevalue(store)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "PAUSE_S", 0.1)
    proxy = CutAnswers(server.port)
    sender, path = run(uri=f"http://127.0.0.1:{proxy.port}", name="lossy")
    for begin in range(0, 3000, 600):
        metrics(path, range(begin, begin + 600))
        time.sleep(0.3)
    spool.append(path, {"kind": "image", "uri": png(tmp_path / "p.png"), "key": "k", "step": 1})
    server.kill()
    metrics(path, range(3000, 3500))
    time.sleep(1)
    server.start()
    spool.append(path, {"kind": "end", "status": "FINISHED"})
    assert sender.close(120), sender.waiting()
    ml = client(server.uri)
    found = ml.search_runs([ml.get_experiment_by_name("tests").experiment_id], "attributes.run_name = 'lossy'")
    assert [r.info.run_id for r in found] == [sender.run_id] and found[0].info.status == "FINISHED"
    assert [step for step, _ in history(server.uri, sender.run_id)] == list(range(3500))
    assert len(ml.list_artifacts(sender.run_id, "images")) == 2
    assert proxy.count > 15 and tracking.probe(server.uri) is None


@pytest.mark.e2e
def test_another_process_sends_later_what_waits(run, mlflow_server, tmp_path):  # noqa: F811
    dead = f"http://127.0.0.1:{free_port()}"
    sender, path = run("later", uri=dead)
    metrics(path, range(20))
    assert not sender.close(2)
    assert tracking.sync(tmp_path, 60, mlflow_server.uri) == (1, 0)
    assert tracking.sync(tmp_path, 60, mlflow_server.uri) == (0, 0)
    ml = client(mlflow_server.uri)
    found = ml.search_runs([ml.get_experiment_by_name("tests").experiment_id], "metrics.`train/loss` > 0")
    mine = [r for r in found if r.data.tags["scalecv.run_key"].endswith("later")]
    assert len(mine) == 1 and len(history(mlflow_server.uri, mine[0].info.run_id)) == 20


def test_another_machine_has_sent_a_part_and_each_point_is_there_once(tmp_path, store):
    """Points of a machine that is lost come later than those of the one that went on, gaps and all."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    metrics(first, range(10))
    metrics(second, range(4, 12))
    for path in (second, first):
        sender = tracking.Sender(path, f"{path}.sent.json", store, "tests", "moved", f"{tmp_path}-moved")
        assert sender.close(30)
    assert sorted(step for step, _ in history(store, sender.run_id)) == list(range(12))


def test_an_answer_that_is_lost_when_a_run_is_found_again_doubles_nothing(run, store, tmp_path, monkeypatch):
    sender, path = run("found")
    metrics(path, range(10))
    assert sender.close(30)
    (tmp_path / "spool.sent.json").unlink()
    asked, newest = [], tracking.mlflow_run.newest

    def fails_once(one):
        asked.append(one)
        if len(asked) == 1:
            raise ConnectionError("the answer was lost")
        return newest(one)

    monkeypatch.setattr(tracking.mlflow_run, "newest", fails_once)
    monkeypatch.setattr(tracking, "PAUSE_S", 0.1)
    later, _ = run("found")
    metrics(path, range(8, 14))
    assert later.close(30) and len(asked) == 2
    assert [step for step, _ in history(store, later.run_id)] == list(range(14))


def test_a_file_in_a_folder_does_not_choose_the_server(run, tmp_path, store, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    dead = f"http://127.0.0.1:{free_port()}"
    sender, path = run("planted", uri=dead)
    metrics(path, range(3))
    assert not sender.close(0.5)
    assert tracking.sync(tmp_path, 1) == (0, 1)
    assert f"say --uri {dead} to send it there" in caplog.text


# ---- looking back


def test_a_word_that_is_no_reference_stays_as_it_is():
    assert tracking.lookup("s3://b/bundle") == "s3://b/bundle"


@pytest.mark.parametrize(
    "model, says", [("runs:/" + "0" * 32, "no run"), ("models:/no@x", "no such model"), ("runs:/a b", "not a run")]
)
def test_what_is_not_there_is_one_clear_error(store, model, says):
    with pytest.raises(UserError, match=says):
        tracking.lookup(model, store)


def test_the_facts_of_a_run_hold_versions_and_no_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    facts = tracking.run_facts()
    assert facts["scalecv.version.mlflow"] and facts["scalecv.python"] and facts["scalecv.cpu"]
    assert "planted-secret" not in json.dumps(facts)


def test_the_diff_of_the_working_directory_is_told_and_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.working_diff() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "a.txt").write_text("one\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    assert tracking.run_facts()["scalecv.git.dirty"] == "false"
    (tmp_path / "a.txt").write_text("two\n")
    assert tracking.run_facts()["scalecv.git.dirty"] == "true" and "+two" in tracking.working_diff()
    (tmp_path / "a.txt").write_text("x" * 100 + "\n" + "line\n" * 400_000)
    assert len(tracking.working_diff()) < (1 << 20) + 200 and "cut here" in tracking.working_diff()


# ---- a bundle as a model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    import torch

    from scalecv.artifacts import bundle as bundles
    from scalecv.models import build_model

    torch.manual_seed(0)
    call = {"arch": "resnet18", "encoder": "resnet18", "in_channels": 3, "outputs": 4, "stem": "small", "norm": "batch"}
    model = build_model(**call, args={}).eval()
    seen = {"bands": None, "color": "rgb", "channels": 3, "dtype": "uint8", "size_px": 16}
    seen |= {"source_dtype": "uint8", "resize": "stretch"}
    facts = {
        "name": "tiny",
        "task": "classify",
        "call": call,
        "pixels": {**seen, "mean": (100.0, 90.0, 80.0), "std": (50.0, 60.0, 70.0)},
        "classes": ("a", "b", "c", "d"),
        "data": {"uri": "s3://b/d", "version": 1, "fingerprint": "f"},
    }
    folder = tmp_path_factory.mktemp("bundle")
    for name, data in bundles.parts(model.state_dict(), **facts).items():
        (folder / name).write_bytes(data)
    return folder


def test_a_bundle_is_a_model_that_mlflow_opens(run, store, bundle, tmp_path, monkeypatch):
    import torch

    from scalecv.artifacts.bundle import open_bundle

    sender, path = run()
    spool.append(path, {"kind": "model", "uri": str(bundle), "name": "model"})
    spool.append(path, {"kind": "model", "uri": str(bundle), "name": "model"})
    began = time.monotonic()
    assert sender.close(60)
    took_s = time.monotonic() - began
    ml = client(store)
    experiment = ml.get_experiment_by_name("tests").experiment_id
    models = ml.search_logged_models([experiment], f"source_run_id = '{sender.run_id}'")
    assert len(models) == 1 and took_s < 30
    assert tracking.lookup(f"runs:/{sender.run_id}", store) == str(bundle)

    import mlflow

    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    found = mlflow.pyfunc.load_model(f"models:/{models[0].model_id}").predict(images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = torch.tensor([100.0, 90, 80]), torch.tensor([50.0, 60, 70])
    with torch.inference_mode():
        logits = open_bundle(str(bundle)).model((pixels - mean[:, None, None]) / std[:, None, None])
    np.testing.assert_allclose(found, torch.softmax(logits, 1).numpy(), atol=1e-5)

    ml.create_registered_model("tiny")
    ml.create_model_version("tiny", f"models:/{models[0].model_id}", run_id=sender.run_id, model_id=models[0].model_id)
    ml.set_registered_model_alias("tiny", "champion", "1")
    assert tracking.lookup("models:/tiny@champion", store) == tracking.lookup("models:/tiny/1", store) == str(bundle)
    with pytest.raises(UserError, match="aliases: champion"):
        tracking.lookup("models:/tiny@challenger", store)
    # Where training's own place is gone, MLflow's copy is used.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ml.set_logged_model_tags(models[0].model_id, {"scalecv.bundle": str(tmp_path / "gone")})
    fetched = tracking.lookup("models:/tiny@champion", store)
    assert fetched.startswith(str(tmp_path / "cache")) and open_bundle(fetched).facts.name == "tiny"
    kept = Path(store.partition("///")[2]).parent
    pickles = [p for p in kept.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    assert pickles == [] and os.path.isfile(Path(fetched) / "model.safetensors")
