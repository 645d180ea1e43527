"""Every point once: the sender dies at each of its steps, the server dies at random times, clocks jump."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scalecv.artifacts import mlflow_client, sent, spool, tracking
from scalecv.artifacts.mlflow_client import client
from tests.servers import empty_store, free_port, mlflow_server  # noqa: F401 - a fixture


class Killed(BaseException):
    """The process is gone; no handler of ours catches it."""


class Fuse:
    """Ends the process at its n-th step; counts the steps where n is 0."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.count = 0
        self.where = ""

    def step(self, where: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.where = where
            raise Killed(where)


class FusedClient:
    """A real client whose every call has a step before it and one after the server has done it."""

    def __init__(self, real, fuse):
        self._real, self._fuse = real, fuse

    def __getattr__(self, name):
        found = getattr(self._real, name)
        if not callable(found):
            return found

        def call(*args, **kwargs):
            self._fuse.step(f"before {name}")
            answer = found(*args, **kwargs)
            self._fuse.step(f"after {name}")
            return answer

        return call


def fused(monkeypatch, fuse):
    """Put the fuse into the client and into each write of the sender's notes."""
    real_client, real_replace = mlflow_client.client, os.replace
    monkeypatch.setattr(mlflow_client, "client", lambda uri: FusedClient(real_client(uri), fuse))

    def replace(part, path):
        fuse.step("before the note")
        real_replace(part, path)
        fuse.step("after the note")

    monkeypatch.setattr(sent.os, "replace", replace)


def write_run(path):
    """A run of 2,103 points, some in batches of 1000, between events of other kinds; step 60 to 80 come twice."""
    spool.append(path, {"kind": "params", "params": {"train.lr": 0.1}})
    spool.append(path, {"kind": "tags", "tags": {"a": "b"}})
    for step in range(80):
        point = {f"m{k}": step + k / 100 for k in range(26)}
        spool.append(path, {"kind": "metrics", "step": step, "time_ms": 1_700_000_000_000 + step, "metrics": point})
    spool.append(path, {"kind": "text", "text": "name: a\n", "file": "experiment.yaml"})
    for step in range(60, 82):
        late = {"m0": step + 1 / 3, "odd": float("nan")}
        spool.append(path, {"kind": "metrics", "step": step, "time_ms": 1_700_000_100_000 + step, "metrics": late})
    spool.append(path, {"kind": "end", "status": "FINISHED"})


def check_run(uri, key):
    """One run, and each of its points once."""
    ml = client(uri)
    experiment = ml.get_experiment_by_name("crash").experiment_id
    (run,) = ml.search_runs([experiment], f"tags.`scalecv.run_key` = '{key}'")
    assert run.info.status == "FINISHED" and run.data.params == {"train.lr": "0.1"} and run.data.tags["a"] == "b"
    for name in ("m0", "m1", "m25"):
        steps = [point.step for point in ml.get_metric_history(run.info.run_id, name)]
        assert sorted(steps) == list(range(82 if name == "m0" else 80)), name
    assert sorted(p.step for p in ml.get_metric_history(run.info.run_id, "odd")) == list(range(60, 82))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return empty_store(tmp_path_factory.mktemp("crash") / "mlruns.db")


def send_until_dead(monkeypatch, store, folder, key, fuse):
    """One life of a sender; True where it came to the end."""
    folder.mkdir(exist_ok=True)
    path = folder / "spool.jsonl"
    if not path.exists():
        write_run(path)
    with monkeypatch.context() as patched:
        patched.setattr(threading, "excepthook", lambda _: None)
        fused(patched, fuse)
        try:
            sender = tracking.Sender(path, folder / "s.sent.json", store, "crash", key, key)
        except Killed:
            return False
        sender._closing.set()
        sender._wake.set()
        sender._thread.join(60)
        assert not sender._thread.is_alive()
        sender._unlock()  # the kernel does so for a process that is gone
        return sender._sent.is_set()


def enumerate_crashes(monkeypatch, store, tmp_path, every):
    monkeypatch.setattr(tracking, "PAUSE_S", 0.01)
    assert send_until_dead(monkeypatch, store, tmp_path / "first", "first", Fuse())  # makes the experiment
    fuse = Fuse()
    assert send_until_dead(monkeypatch, store, tmp_path / "quiet", "quiet", fuse)
    check_run(store, "quiet")
    seen = set()
    for at in range(1, fuse.count + 1, every):
        burning = Fuse(at)
        key = f"at-{at}-{every}"
        assert not send_until_dead(monkeypatch, store, tmp_path / key, key, burning)
        assert send_until_dead(monkeypatch, store, tmp_path / key, key, Fuse())
        check_run(store, key)
        seen.add(burning.where)
    return fuse.count, seen


def test_a_sender_that_dies_at_any_eighth_step_doubles_and_loses_nothing(monkeypatch, store, tmp_path):
    count, _ = enumerate_crashes(monkeypatch, store, tmp_path, 8)
    assert count > 30


@pytest.mark.chaos
def test_a_sender_that_dies_at_any_step_doubles_and_loses_nothing(monkeypatch, store, tmp_path):
    count, seen = enumerate_crashes(monkeypatch, store, tmp_path, 1)
    assert {"after log_batch", "before the note", "after the note", "after create_run", "after log_text"} <= seen, count


def test_one_that_dies_again_and_again_comes_to_the_end(monkeypatch, store, tmp_path):
    """Each life ends a few steps after it began, until one is long enough."""
    monkeypatch.setattr(tracking, "PAUSE_S", 0.01)
    lives = 0
    while not send_until_dead(monkeypatch, store, tmp_path / "again", "again", Fuse(9 + 5 * lives)):
        lives += 1
        assert lives < 40
    check_run(store, "again")
    assert lives > 3


def test_notes_that_are_damaged_or_gone_in_the_middle_double_nothing(monkeypatch, store, tmp_path):
    monkeypatch.setattr(tracking, "PAUSE_S", 0.01)
    assert not send_until_dead(monkeypatch, store, tmp_path / "notes", "notes", Fuse(25))
    notes = tmp_path / "notes" / "s.sent.json"
    notes.write_bytes(notes.read_bytes()[:50])
    assert send_until_dead(monkeypatch, store, tmp_path / "notes", "notes", Fuse())
    check_run(store, "notes")


@pytest.mark.parametrize("jump_s", [-86400, -3600, 3600])
def test_a_clock_that_jumps_loses_nothing_and_makes_no_negative_duration(jump_s, store, tmp_path):
    path, key = tmp_path / "s", f"jump{jump_s}"
    now = int(time.time() * 1000)
    for step in range(100):
        shift = jump_s * 1000 if step >= 50 else 0
        event = {"kind": "metrics", "step": step, "time_ms": now + step + shift, "metrics": {"m": step / 7}}
        spool.append(path, event)
    spool.append(path, {"kind": "end", "status": "FINISHED", "time_ms": now + 100 + jump_s * 1000})
    sender = tracking.Sender(path, tmp_path / "s.sent.json", store, "jumps", key, key)
    assert sender.close(60)
    ml = client(store)
    run = ml.get_run(sender.run_id)
    assert run.info.end_time >= run.info.start_time and run.data.metrics["m"] == 99 / 7
    assert sorted(p.step for p in ml.get_metric_history(sender.run_id, "m")) == list(range(100))


# ---- a real server that dies


SENDING = """
import sys, threading
from scalecv.artifacts import tracking
uri, path, key = sys.argv[1:4]
sender = tracking.Sender(path, path + ".sent.json", uri, "chaos", key, key)
sys.exit(0 if sender.close(float(sys.argv[4])) else 1)
"""


def sending(uri, path, key, patience_s):
    command = [sys.executable, "-c", SENDING, uri, str(path), key, str(patience_s)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.mark.chaos
def test_ten_thousand_points_while_server_and_senders_are_killed_at_random(mlflow_server, tmp_path):  # noqa: F811
    """The server is killed six times and the sender eight times, at random moments of writing 10,000 points."""
    draw, path, key = random.Random(20), tmp_path / "spool.jsonl", "chaos"
    written = threading.Event()

    def train():
        for step in range(2_000):
            spool.append(path, {"kind": "metrics", "step": step, "metrics": {f"m{k}": step + k for k in range(5)}})
            if step % 20 == 0:
                time.sleep(0.5)
        spool.append(path, {"kind": "end", "status": "FINISHED"})
        written.set()

    threading.Thread(target=train, daemon=True).start()
    kills = ["server"] * 6 + ["sender"] * 8
    draw.shuffle(kills)
    process = sending(mlflow_server.uri, path, key, 600)
    for victim in kills:
        time.sleep(draw.uniform(0.5, 6))
        if victim == "server":
            mlflow_server.kill()
            time.sleep(draw.uniform(0, 3))
            mlflow_server.start()
        else:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = sending(mlflow_server.uri, path, key, 600)
    assert written.wait(300)
    process.kill()  # the last one began before the end was written, or gave up
    process.wait()
    assert tracking.sync(tmp_path, 300) in ((1, 0), (0, 0))
    ml = client(mlflow_server.uri)
    (run,) = ml.search_runs([ml.get_experiment_by_name("chaos").experiment_id])
    assert run.info.status == "FINISHED"
    for k in range(5):
        found = ml.get_metric_history(run.info.run_id, f"m{k}")
        assert sorted(p.step for p in found) == list(range(2_000))
        assert all(p.value == p.step + k for p in found)


@pytest.mark.chaos
def test_a_server_that_is_away_at_first_and_one_that_says_no(mlflow_server, tmp_path, monkeypatch):  # noqa: F811
    """Away at the start, then 403 to this host name, then well: 1,000 points, each once."""
    monkeypatch.setattr(tracking, "PAUSE_S", 0.1)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_S", 1.0)
    path = tmp_path / "spool.jsonl"
    mlflow_server.kill()
    sender = tracking.Sender(path, tmp_path / "s.sent.json", mlflow_server.uri, "away", "a", "a")
    for step in range(1000):
        spool.append(path, {"kind": "metrics", "step": step, "metrics": {"m": step}})
    time.sleep(1)
    assert sender.run_id is None
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "elsewhere.example")
    mlflow_server.start()
    time.sleep(3)
    assert sender.run_id is None and "403" in sender.waiting(), sender.waiting()
    mlflow_server.kill()
    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS")
    mlflow_server.start()
    assert sender.close(60), sender.waiting()
    steps = [p.step for p in client(mlflow_server.uri).get_metric_history(sender.run_id, "m")]
    assert sorted(steps) == list(range(1000))


def test_the_training_process_opens_no_connection_while_it_writes(tmp_path):
    """Whatever the address of MLflow is, an append is a write to a file."""
    code = (
        "import sys, os; seen = []\n"
        "sys.addaudithook(lambda e, a: seen.append((e, a)) if e.startswith('socket.') else None)\n"
        "from scalecv.artifacts import spool\n"
        "for n in range(200): spool.append(sys.argv[1], {'kind': 'metrics', 'step': n, 'metrics': {'m': 1.0}})\n"
        "print(seen, 'mlflow' in sys.modules)"
    )
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
    command = [sys.executable, "-c", code, str(Path(tmp_path) / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env)
    assert done.stdout.strip() == "[] False"
