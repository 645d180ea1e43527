"""Stops, kills, hangs and numbers that are none: nothing is lost, nothing is done twice."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from scalecv import config
from scalecv.artifacts import spool
from scalecv.errors import ConfigError, Interrupted
from scalecv.train import runs
from scalecv.train.checks import check_names, sizes
from scalecv.train.nonfinite import NonFiniteError
from scalecv.train.requests import Requests
from scalecv.train.run import train
from scalecv.train.watchdog import Watchdog
from scalecv.train.writer import Writer, first_non_finite, on_host
from tests.small import write_net
from tests.train import ranks

ROOT = Path(__file__).parents[2]


def folder(experiment):
    return Path(runs.home(experiment)) / "001"


def saved(experiment):
    """Position of each checkpoint: updates -> (epoch, step)."""
    found = {}
    for manifest in sorted((folder(experiment) / "checkpoints").glob("*/manifest.json")):
        told = json.loads((manifest.parent / "resume.json").read_text())
        found[told["updates"]] = (told["epoch"], told["step"])
    return found


def in_a_process(experiment, tmp_path, script, *arguments):
    command = [sys.executable, "-c", script, experiment.model_dump_json(), *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def test_a_stop_is_heard_at_the_step_it_comes_in(shapes, net):
    """A point each 100 steps, and a SIGTERM in the forward pass of the second step of epoch 2."""
    keys = net("stopping", "if self.calls == 7: os.kill(os.getpid(), 15); time.sleep(0.01)")
    experiment = shapes(name="stopped", track__log_every=100, **keys)
    with pytest.raises(Interrupted):
        train(experiment)
    steps = max(step for _, step in saved(experiment).values())
    assert max(saved(experiment)) == 7 and steps < 5, saved(experiment)


def test_a_stop_during_validation_goes_on_from_there(shapes, net):
    keys = net(
        "validating",
        "if not self.training and not os.path.exists('asked'): open('asked', 'w').close(); os.kill(os.getpid(), 15)",
    )
    experiment = shapes(name="stopped", **keys)
    with pytest.raises(Interrupted):
        train(experiment)
    assert saved(experiment) == {5: (0, 5)}
    rest, quiet = train(experiment), train(shapes(name="quiet", **net("still", "pass")))
    assert (rest.order_hash, rest.weights_hash) == (quiet.order_hash, quiet.weights_hash)


KILLED = """
import sys, os, signal, json
from scalecv import config
from scalecv.train.run import train
def tell(event):
    if event["kind"] == "checkpoint" and event["updates"] >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
train(config.build(json.loads(sys.argv[1]), "test"), tell=tell)
"""


def test_killed_after_a_checkpoint_within_an_epoch_it_ends_as_if_it_had_not_been(shapes, net, tmp_path):
    """Weights, order and the loss of each epoch, to the last bit; and the wish for checkpoints changes nothing."""
    keys = {"track__log_every": 3, "train__epochs": 4, **net("pausing", "time.sleep(0.05)")}
    quiet = train(shapes(name="quiet", **keys))
    experiment = shapes(name="killed", track__checkpoint_steps=2, **keys)
    ended = in_a_process(experiment, tmp_path, KILLED, "7")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert any(step for _, step in saved(experiment).values()), "one within an epoch"
    told = []
    rest = train(experiment, tell=told.append)
    assert any("goes on in epoch" in event.get("message", "") for event in told)
    assert (rest.weights_hash, rest.order_hash) == (quiet.weights_hash, quiet.order_hash)
    losses = [[row["train/loss"] for row in history(result)] for result in (rest, quiet)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def history(result):
    last = max((Path(result.run_uri) / "checkpoints").iterdir())
    return json.loads((last / "resume.json").read_text())["history"]


def test_the_clock_asks_for_checkpoints_and_the_newest_and_best_are_kept(shapes):
    result = train(shapes(track__checkpoint_minutes=1e-6, track__keep=1, track__log_every=1))
    events, _ = spool.read(Path(result.run_uri) / "spool.jsonl")
    updates = [event["updates"] for event in events if event["kind"] == "checkpoint"]
    assert len(updates) > result.epochs and updates == sorted(updates), "more than one for each epoch"
    assert len(list((Path(result.run_uri) / "checkpoints").iterdir())) <= 2
    told = {name for event in events if event["kind"] == "metrics" for name in event["metrics"]}
    assert {"system/checkpoint_stall_s", "system/checkpoint_write_s"} <= told
    workers = next(event for event in events if event["kind"] == "workers")
    assert workers["pids"] == [os.getpid()] and len(workers["hosts"]) == 1


def test_a_state_is_copied_and_written_beside():
    weight = torch.ones(3)
    copy = on_host({"a": weight, "b": {0: {"step": weight, "lr": 0.1}}})
    weight += 1
    assert copy["a"].tolist() == copy["b"][0]["step"].tolist() == [1, 1, 1] and copy["b"][0]["lr"] == 0.1
    assert first_non_finite({"n": torch.tensor([1]), "x": torch.tensor([1.0, math.inf])}) == "x"
    writer, gate = Writer(), threading.Event()
    assert writer.is_done()
    writer.start(gate.wait)
    assert not writer.is_done()
    gate.set()
    assert writer.is_done(5)
    writer.start(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        writer.is_done(5)


def test_a_notice_of_preemption_asks_for_checkpoints_at_once(tmp_path):
    drains = []
    with Requests(str(tmp_path / "STOP"), 10.0, drains=lambda: bool(drains)) as requests:
        requests.begin()
        assert not requests.end().save
        drains.append(1)
        requests.begin()
        asked = requests.end()
        assert asked.save and not asked.stop and not asked.leave
        requests.saved()
        requests.begin()
        assert not requests.end().save
        assert requests.due - time.monotonic() < 11, "and again while it drains"


def test_rows_whose_loss_is_no_number_are_named(shapes, net):
    keys = net("nan", "x = torch.cat([x[:2], x[2:3] * (float('nan') if self.calls == 3 else 1), x[3:]])")
    experiment = shapes(name="nan", track__checkpoint_steps=1, **keys)
    with pytest.raises(
        NonFiniteError, match=r"epoch 1, step 3: the weights were not updated. the loss of 1 rows"
    ) as said:
        train(experiment)
    told = json.loads((folder(experiment) / "nonfinite.json").read_text())
    bad = [row["id"] for row in told["rows"] if row["loss"]["cross_entropy"] == "nan"]
    assert (told["epoch"], told["step"], len(told["rows"]), len(bad)) == (0, 2, 16, 1)
    assert bad[0] in str(said.value) and "nonfinite.json" in str(said.value)
    assert max(saved(experiment)) == 2


def test_weights_that_are_no_numbers_are_never_saved(shapes, net):
    keys = net("inf", "self.seen.fill_(float('inf') if self.calls > 5 else 0)")
    experiment = shapes(name="inf", **keys)
    with pytest.raises(NonFiniteError, match="seen is not finite after 10 updates: no checkpoint was written"):
        train(experiment)
    assert saved(experiment) == {5: (1, 0)}


HANGS = """
import sys, json
from scalecv import config
from scalecv.train.run import train
train(config.build(json.loads(sys.argv[1]), "test"))
"""


@pytest.mark.chaos
def test_a_process_that_hangs_saves_its_stacks_and_ends(shapes, net, tmp_path):
    act = "hang(self.calls == 3, marker)"
    keys = net("hanging", act)
    with (tmp_path / "hanging.py").open("a") as file:
        file.write(
            "\ndef hang(now, marker):\n"
            "    if now and not os.path.exists(marker):\n"
            "        open(marker, 'w').close()\n"
            "        time.sleep(1000)\n"
        )
    keys["model__args"] = {"marker": str(tmp_path / "marker")}
    experiment = shapes(name="hanging", scale__hang_after_s=4, track__checkpoint_steps=1, **keys)
    ended = in_a_process(experiment, tmp_path, HANGS)
    assert ended.returncode == 1 and "rank0 did not move for 4 s (scale.hang_after_s)" in ended.stderr
    (stacks,) = (folder(experiment) / "stacks").iterdir()
    assert "in hang" in stacks.read_text() and "_watch" in stacks.read_text()
    told = []
    assert train(experiment, tell=told.append).status == "finished"
    assert any("hung before" in event.get("message", "") for event in told)


def test_the_watchdog_knows_start_up_from_a_hang(tmp_path):
    barked = []
    with Watchdog(0.5, str(tmp_path), "rank0", barked.append):
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            sum(range(1000))  # busy, as torch.compile is
        assert not barked
        time.sleep(5)
    assert len(barked) == 1 and list(tmp_path.iterdir())


def test_a_run_that_ends_while_its_stacks_are_saved_has_ended(tmp_path):
    barked = []
    with Watchdog(0.2, str(tmp_path), "rank0", barked.append) as watchdog:
        watchdog.tick()
        time.sleep(1.5)
    time.sleep(3.5)
    assert list(tmp_path.iterdir()) and not barked


EXACT = {"train__exact": True, "track__log_every": 1, "train__epochs": 4}


def wait_for(experiment, updates, starts=1):
    """Until the run has been started so many times, and has made so many updates in all."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        events, _ = spool.read(folder(experiment) / "spool.jsonl")
        begun = [at for at, event in enumerate(events) if event["kind"] == "workers"]
        if len(begun) >= starts and max((e.get("step", 0) for e in events[begun[-1] :]), default=0) >= updates:
            return
        time.sleep(0.05)
    raise AssertionError("it did not get there")


@pytest.mark.parametrize("numbers", [[2, 1, 2], [4, 2, 1, 4]], ids=str)
@pytest.mark.chaos
def test_other_numbers_of_workers_on_the_way(shapes, net, tmp_path, numbers):
    """A rank is told to go, or the run is stopped, each in mid-epoch: the end is that of one process, bit for bit."""
    keys = {**EXACT, "train__epochs": 2 * len(numbers), **net("pausing", "time.sleep(0.05)")}
    quiet = train(shapes(name="quiet", **keys))
    experiment = shapes(name="elastic", scale__workers=max(numbers), **keys)
    reached = 0
    for starts, number in enumerate(numbers[:-1], 1):
        started = ranks.start(experiment, number, tmp_path)
        wait_for(experiment, reached + 2, starts)
        if number > 1:
            started[-1].send_signal(signal.SIGTERM)
            assert ranks.ended(started)[0] == [ranks.LEFT] * number
        else:
            (folder(experiment) / "STOP").write_bytes(b"stop")
            assert ranks.ended(started)[0] == [0]
            (folder(experiment) / "STOP").unlink()
        assert reached < max(saved(experiment)) < 10 * len(numbers)
        reached = max(saved(experiment))

    statuses, said = ranks.ended(ranks.start(experiment, numbers[-1], tmp_path))
    assert statuses == [0] * numbers[-1], said
    events, _ = spool.read(folder(experiment) / "spool.jsonl", most_bytes=1 << 30)
    result = [event for event in events if event["kind"] == "result"][-1]
    assert (result["order_hash"], result["weights_hash"]) == (quiet.order_hash, quiet.weights_hash)
    assert [len(event["pids"]) for event in events if event["kind"] == "workers"] == numbers
    told = [event["step"] for event in events if event["kind"] == "metrics" and "train/lr" in event["metrics"]]
    assert set(told) == set(range(1, 10 * len(numbers) + 1))
    costs = [event["message"] for event in events if "without it" in event.get("message", "")]
    assert len(costs) == 1 and costs[0].startswith("train.exact=true: the gradients of a batch take"), costs


@pytest.mark.chaos
def test_three_workers_go_on_with_the_same_weights(shapes, tmp_path):
    """Three ranks add in an order that depends on how DDP cuts its buckets, which a new process may do otherwise."""
    keys = {"train__batch": 12, "train__epochs": 3, "scale__workers": 3, "track__log_every": 1}
    quiet = shapes(name="quiet", **keys)
    assert ranks.ended(ranks.start(quiet, 3, tmp_path))[0] == [0] * 3
    experiment = shapes(name="stopped", **keys)
    three = ranks.start(experiment, 3, tmp_path)
    wait_for(experiment, 3)
    three[1].send_signal(signal.SIGTERM)
    assert ranks.ended(three)[0] == [ranks.LEFT] * 3
    assert max(saved(experiment)) < 15
    assert ranks.ended(ranks.start(experiment, 3, tmp_path))[0] == [0] * 3

    def result(one):
        events, _ = spool.read(folder(one) / "spool.jsonl", most_bytes=1 << 30)
        told = [event for event in events if event["kind"] == "result"][-1]
        return told["order_hash"], told["weights_hash"]

    assert result(experiment) == result(quiet)


def test_batch_statistics_that_no_norm_replaces_are_refused(shapes, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = write_net(tmp_path, "flat", "pass")
    source = (tmp_path / "flat.py").read_text()
    (tmp_path / "flat.py").write_text(source.replace("nn.Flatten(),", "nn.Flatten(), nn.BatchNorm1d(8),"))
    with pytest.raises(ConfigError, match=r"train.exact=true: 1 layers .* such as body.5 \(BatchNorm1d\)"):
        train(shapes(name="flat", **EXACT, **keys))


def test_the_number_of_threads_is_that_of_the_beginning(shapes, net, monkeypatch):
    """A machine with more cores would round otherwise."""
    experiment = shapes(name="threads", train__threads=None, **net("still", "pass"))

    def stop(event):
        if event.get("is_epoch_end"):
            (folder(experiment) / "STOP").write_bytes(b"stop")

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(Interrupted):
        train(experiment, tell=stop)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert train(experiment).is_continued and torch.get_num_threads() == 1


def test_a_terminal_that_is_gone_ends_nothing(shapes, net):
    def tell(event):
        raise BrokenPipeError

    assert train(shapes(name="gone", **net("still", "pass")), tell=tell).status == "finished"


def test_tied_weights_reach_the_bundle(shapes, net, tmp_path):
    keys = net("tied", "pass")
    source = (tmp_path / "tied.py").read_text()
    (tmp_path / "tied.py").write_text(source.replace("self.calls = 0", "self.calls = 0; self.same = self.body[0]"))
    assert train(shapes(name="tied", **keys)).status == "finished"


@pytest.mark.chaos
def test_a_stopped_process_is_noticed_by_the_other(shapes, tmp_path):
    keys = {**EXACT, "model__norm": "group", "train__epochs": 1000}
    experiment = shapes(name="still", scale__workers=2, scale__hang_after_s=4, **keys)
    two = ranks.start(experiment, 2, tmp_path)
    wait_for(experiment, 2)
    two[1].send_signal(signal.SIGSTOP)
    try:
        said = two[0].communicate(timeout=60)[1]
    finally:
        two[1].kill()
    assert two[0].returncode == 1 and "rank0 did not move for 4 s" in said
    assert "in _one_epoch" in next((folder(experiment) / "stacks").iterdir()).read_text()


def test_sizes_that_a_run_may_have(shapes):
    assert sizes(shapes()) == [0] and sizes(shapes(scale__workers=2)) == [2]
    keys = {"scale__workers": 8, "scale__min_workers": 1, "train__batch": 48}
    assert sizes(shapes(**keys)) == [8, 6, 4, 3, 2, 1]
    assert sizes(shapes(**keys, train__micro_batch=6)) == [8, 4, 2, 1]
    keys |= {"scale__workers": 4, "train__exact": True, "model__norm": "group"}
    assert sizes(shapes(**keys)) == [4, 2, 1]
    with pytest.raises(ConfigError, match=r"scale.min_workers=3: train.batch=48 with train.exact=true .* set .*=4"):
        train(shapes(**{**keys, "scale__min_workers": 3}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model.arch": "resnet19"}, "resnet19.*resnet18"),
        ({"task": "segment", "model.arch": "unet", "model.encoder": "resnet19"}, "resnet19.*resnet18"),
    ],
)
def test_an_unknown_network_is_named_without_a_worker(keys, words):
    tree = {"name": "x", "task": "classify", "data": {"uri": "x"}, "model": {"arch": "resnet18"}}
    check_names(config.build(tree, "test"))
    with pytest.raises(ConfigError, match=words):
        check_names(config.build(config.with_overrides(tree, keys), "test"))
