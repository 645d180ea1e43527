"""Hosts of their own in network namespaces: what a cut cable does that no kill does, since no connection is closed."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scalecv.testing.servers import NotStarted, process_tree, wait_for
from tests.e2e.test_nodes import DRIVER, KEYS, ROOT, SLOW, events, result_of, sizes, steps
from tests.e2e.test_nodes import wait_for as wait_for_events
from tests.small import write_net

pytestmark = [pytest.mark.e2e, pytest.mark.chaos]
NET, BRIDGE = "10.231.77", "scvbr0"
RAY = str(Path(sys.executable).parent / "ray")
FAST = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def network():
    """A bridge with the address .1, and two hosts behind it: namespaces with the addresses .2 and .3."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to make network namespaces here")
    names = ["scvhost2", "scvhost3"]
    try:
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(names, 2):
            ip("netns", "add", name)
            ip("link", "add", f"scv{number}", "type", "veth", "peer", "name", "scv0", "netns", name)
            ip("link", "set", f"scv{number}", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "scv0")
            ip("-n", name, "link", "set", "scv0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@pytest.fixture
def ray_on_hosts(network, tmp_path):
    """A head without CPUs on the bridge, and a node with one CPU on each host; gives the head's address."""
    started = []
    temporary = tempfile.mkdtemp(prefix="scv")  # sockets lie in it, and their paths must be short

    def start(options, log, host=None):
        command = [RAY, "start", *options.split(), "--block"]
        if host:  # shares neither sockets nor memory with the others
            (tmp_path / host).mkdir()
            own = f'mount --bind {tmp_path / host} {temporary}; mount -t tmpfs tmpfs /dev/shm; exec "$@"'
            command = ["ip", "netns", "exec", host, "unshare", "-m", "bash", "-c", own, "bash", *command]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | FAST
        environment |= {"GLOO_SOCKET_IFNAME": "scv0"} if host else {}
        with log.open("wb") as out:
            started.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True))
        wait_for(lambda: "Ray runtime started" in log.read_text(errors="replace"), 60, started[-1], log)

    quiet = "--object-store-memory=200000000 --disable-usage-stats"
    try:
        head = f"--head --node-ip-address={NET}.1 --port=6399 --num-cpus=0 --include-dashboard=false {quiet}"
        head += f" --temp-dir={temporary}"
        start(head, tmp_path / "head.log")
        for number, name in enumerate(network, 2):
            options = f"--address={NET}.1:6399 --node-ip-address={NET}.{number} --num-cpus=1 {quiet}"
            for attempt in range(3):  # a node that starts on a busy machine may miss Ray's 30 s
                shutil.rmtree(tmp_path / name, ignore_errors=True)
                with contextlib.suppress(NotStarted):
                    start(options, tmp_path / f"{name}-{attempt}.log", name)
                    break
        yield f"{NET}.1:6399"
    finally:
        for process in reversed(started):
            for pid in process_tree(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            process.wait(20)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.timeout(900)
def test_a_cable_is_cut_and_plugged_in_again(shapes, ray_on_hosts, tmp_path, monkeypatch):
    """The other rank waits in an all-reduce that nobody ends; the run goes on alone, and every step is there."""
    keys = {**KEYS, **write_net(tmp_path, "slow", SLOW), "model__args": {"pause_s": 0.3}, "train__epochs": 30}
    keys |= {"scale__min_workers": 1, "scale__hang_after_s": 60, "track__checkpoint_steps": 2}
    experiment = shapes(name="cut", scale__workers=2, **keys)
    command = [sys.executable, "-c", DRIVER, experiment.model_dump_json(), str(tmp_path), "10"]
    environment = os.environ | FAST | {"RAY_ADDRESS": ray_on_hosts, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_events(experiment, lambda found: len(steps(found)) > 3, driver)
        ip("link", "set", "scv3", "down")
        wait_for_events(experiment, lambda found: sizes(found) == [2, 1], driver)
        result = result_of(driver)
    finally:
        if driver.poll() is None:
            driver.kill()
    told = steps(events(experiment))
    assert set(told) == set(range(1, 151)) and result["status"] == "finished"
    monkeypatch.syspath_prepend(str(tmp_path))
    from scalecv.train.run import train

    alone = train(shapes(name="quiet", **{**keys, "model__args": {"pause_s": 0.0}, "scale__min_workers": None}))
    assert (result["order_hash"], result["weights_hash"]) == (alone.order_hash, alone.weights_hash)
