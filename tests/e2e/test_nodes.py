"""Nodes that are lost, taken away with notice, and come back; workers that hang. Real raylets, real signals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scalecv.artifacts import spool
from scalecv.train import runs
from scalecv.train.run import train
from tests.small import write_net

pytestmark = [pytest.mark.e2e, pytest.mark.chaos]
ROOT = Path(__file__).parents[2]
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
SLOW = """
if self.training:
    time.sleep(pause_s)
if marker and self.calls == 12 and not os.path.exists(marker) and rank == 1:
    open(marker, "w").close()
    time.sleep(1000)
"""
KEYS = {"train__exact": True, "track__log_every": 1, "data__reader": "threads"}
KEYS |= {"model__arch": "slow:build", "model__stem": "default", "model__norm": "group"}
DRIVER = """
import json, sys
from dataclasses import asdict
from scalecv import config
from scalecv.errors import ScalecvError
from scalecv.train import ray_scaling
from scalecv.train.run import train
from tests.small import write_net
ray_scaling.ROOM_S = ray_scaling.SETTLE_S = float(sys.argv[3])
try:
    print(json.dumps(asdict(train(config.build(json.loads(sys.argv[1]), "test"), code_dirs=(sys.argv[2],)))))
except ScalecvError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs; nodes are added by the test."""
    for name, value in NO_TOKEN.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    yield made
    made.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=100 << 20)


@pytest.fixture
def driver(cluster, tmp_path):
    """A function that starts `train` on the cluster in a process of its own."""
    write_net(tmp_path, "slow", SLOW)
    started = []

    def start(experiment, patience_s=5):
        command = [sys.executable, "-c", DRIVER, experiment.model_dump_json(), str(tmp_path), str(patience_s)]
        environment = os.environ | NO_TOKEN | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def events(experiment):
    return spool.read(Path(runs.home(experiment)) / "001" / "spool.jsonl", most_bytes=1 << 30)[0]


def wait_for(experiment, holds, process, timeout_s=240):
    until = time.monotonic() + timeout_s
    while not holds(events(experiment)):
        assert process.poll() is None and time.monotonic() < until, (process.poll(), events(experiment)[-3:])
        time.sleep(0.2)


def sizes(found):
    return [len(event["pids"]) for event in found if event["kind"] == "workers"]


def steps(found):
    return [event["step"] for event in found if event["kind"] == "metrics" and "train/lr" in event["metrics"]]


def result_of(process, timeout_s=400):
    out, said = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, said[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def quiet(shapes, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda **keys: train(shapes(name="quiet", **{**KEYS, **keys}))


def test_a_node_that_is_taken_away_with_notice(shapes, cluster, driver, quiet):
    """A checkpoint at once and every ten seconds until the deadline, then the run goes on with the spare node."""
    import ray

    for _ in range(3):
        add_node(cluster)
    args = {"model__args": {"pause_s": 0.5}, "train__epochs": 30}
    experiment = shapes(name="drained", scale__workers=2, **KEYS, **args)
    process = driver(experiment)
    wait_for(experiment, lambda found: len(steps(found)) > 3, process)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        used = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        free = ray._private.state.available_resources_per_node()
        victim = next(node for node in used if not free.get(node, {}).get("CPU"))
    finally:
        ray.shutdown()
    before = len(events(experiment))
    asked = ["drain-node", "--address", cluster.address, "--node-id", victim, "--reason"]
    asked += ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "25"]
    ray_command = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray_command, *asked], check=True, env=os.environ | NO_TOKEN, capture_output=True)
    wait_for(experiment, lambda found: any(e["kind"] == "checkpoint" for e in found[before:]), process, 20)
    wait_for(experiment, lambda found: len(sizes(found)) == 2, process)
    done = steps(events(experiment))
    result = result_of(process)
    again = len(steps(events(experiment))) - len(set(steps(events(experiment))))
    assert again < 25, f"{again} steps were done twice of {len(done)}"
    still = quiet(model__args={"pause_s": 0.0}, train__epochs=30)
    assert result["order_hash"] == still.order_hash


def test_fewer_workers_while_a_node_is_lost_and_all_when_it_is_back(shapes, cluster, driver, quiet):
    nodes = [add_node(cluster) for _ in range(2)]
    args = {"model__args": {"pause_s": 0.3}, "train__epochs": 40, "track__checkpoint_steps": 2}
    experiment = shapes(name="elastic", scale__workers=2, scale__min_workers=1, **KEYS, **args)
    process = driver(experiment)
    wait_for(experiment, lambda found: len(steps(found)) > 3, process)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(experiment, lambda found: sizes(found) == [2, 1], process)
    add_node(cluster)
    wait_for(experiment, lambda found: sizes(found) == [2, 1, 2], process)
    result = result_of(process)
    told = steps(events(experiment))
    assert set(told) == set(range(1, 201)) and result["status"] == "finished"
    alone = quiet(model__args={"pause_s": 0.0}, train__epochs=40)
    assert (result["order_hash"], result["weights_hash"]) == (alone.order_hash, alone.weights_hash)


def test_no_room_any_more_is_said_in_one_line(shapes, cluster, driver):
    nodes = [add_node(cluster) for _ in range(2)]
    args = {"model__args": {"pause_s": 0.3}, "train__epochs": 60}
    experiment = shapes(name="lost", scale__workers=2, **KEYS, **args)
    process = driver(experiment, patience_s=15)
    wait_for(experiment, lambda found: len(steps(found)) > 3, process)
    cluster.remove_node(nodes[1], allow_graceful=False)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "room for 1 of at least 2 workers: add a node or set scale.min_workers=1" in said, said[-2000:]


@pytest.mark.usefixtures("ray_local")
def test_a_worker_that_hangs_is_started_again(shapes, tmp_path, monkeypatch):
    write_net(tmp_path, "slow", SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = {**KEYS, "model__args": {"marker": str(tmp_path / "marker")}, "track__checkpoint_steps": 2}
    experiment = shapes(name="hangs", scale__workers=2, scale__hang_after_s=5, **keys)
    told = []
    result = train(experiment, code_dirs=(str(tmp_path),), tell=told.append)
    assert (tmp_path / "marker").exists()
    assert sizes(told) == [2, 2] and any("hung before" in e.get("message", "") for e in told)
    stacks = sorted(path.name.partition("-")[0] for path in (Path(result.run_uri) / "stacks").iterdir())
    assert stacks == ["rank0", "rank1"], "both hung: one slept, one waited for it"
    alone = train(shapes(name="quiet", scale__workers=0, **keys))
    assert (result.order_hash, result.weights_hash) == (alone.order_hash, alone.weights_hash)
