"""The faults: each runs the recipe under a name of its own, does harm at a step, lets the run end, and is judged."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from scalecv import storage
from scalecv.chaos.lab import Lab, NotHere, newest_checkpoint, steps_of
from scalecv.chaos.verdict import Outcome, Run, judge
from scalecv.testing.servers import MlflowServer, RayNodes, S3Server, process_tree
from scalecv.testing.train_process import TrainProcess

AWAY_S = 20.0
"""Seconds that a store or a tracking server is gone."""
BAD_STORE = {"busy": 0.3, "cut": 0.2, "reset": 0.02}
"""Shares of requests answered with 503, cut in the middle, and reset."""
ENDED = "the run ended before step"


def worker(lab: Lab, quiet: Run, name: str, step: int, draw: random.Random) -> Outcome:
    """SIGKILL of one worker; Ray starts all of them again from the newest checkpoint."""
    if lab.experiment.scale.workers == 0:
        raise NotHere("scale.workers=0: there are no workers, only the process of the command (fault driver)")
    with _started(lab.process(name)) as run:
        began = time.monotonic()
        _reach(run, step)
        rank = draw.randrange(len(run.pids))
        os.kill(run.pids[rank], signal.SIGKILL)
        held = newest_checkpoint(str(lab.run_folder(name)))
        ended = lab.finish(run, began=began)
    what = f"rank {rank} of {lab.experiment.scale.workers} killed at step {step}"
    return judge("worker", step, what, quiet, ended, held=held, record=lab.record_of(name))


def driver(lab: Lab, quiet: Run, name: str, step: int, draw: random.Random) -> Outcome:
    """SIGKILL of the command itself; the same command is given again at once."""
    with _started(lab.process(name)) as run:
        began = time.monotonic()
        _reach(run, step)
        left = process_tree(run.running.pid)
        run.kill()
        held, done = newest_checkpoint(str(lab.run_folder(name))), steps_of(run)
        with _started(run):
            ended = lab.finish(run, done, began)
        _gone(left)
    what = f"the command killed at step {step}, given again"
    return judge("driver", step, what, quiet, ended, held=held, record=lab.record_of(name))


def node(lab: Lab, quiet: Run, name: str, step: int, draw: random.Random) -> Outcome:
    """A node is lost with all that runs on it; the workers start again on another one."""
    scale = lab.experiment.scale
    if scale.workers == 0:
        raise NotHere("scale.workers=0 uses no nodes")
    nodes = RayNodes(lab.folder / "logs" / name / "nodes", scale.workers * scale.cpus_per_worker)
    try:
        nodes.start(2)
        with _started(lab.process(name, environment=nodes.environment)) as run:
            began = time.monotonic()
            _reach(run, step)
            lost = nodes.node_of(draw.choice(run.pids))
            if lost is None:
                raise NotHere("the workers run on no node that was started for this")
            nodes.kill(lost)
            held = newest_checkpoint(str(lab.run_folder(name)))
            ended = lab.finish(run, began=began)
    finally:
        nodes.stop()
    what = f"a node with workers killed at step {step}"
    return judge("node", step, what, quiet, ended, held=held, record=lab.record_of(name))


def store(lab: Lab, quiet: Run, name: str, step: int, draw: random.Random) -> Outcome:
    """Data and checkpoints through an object store that answers badly all the time, and not at all for a while."""
    with contextlib.ExitStack() as stack:
        endpoint, environment, keys = _object_store(lab, stack)
        proxy = stack.enter_context(_proxy(endpoint))
        tell = proxy.tell
        tell({**BAD_STORE, "seed": draw.randrange(1 << 30)})
        keys |= {"name": f"{lab.experiment.name}-{name}"}
        environment |= {"AWS_ENDPOINT_URL": proxy.endpoint}
        run = stack.enter_context(_started(lab.process(name, keys, environment)))
        began = time.monotonic()
        _reach(run, step)
        tell({"away": True})
        back = threading.Timer(AWAY_S, tell, [{**BAD_STORE, "seed": draw.randrange(1 << 30)}])
        back.start()
        ended = lab.finish(run, began=began)
        back.join()
        done = tell({})
    what = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
    what = f"store with 30 % 503, 20 % cut bodies, away for {AWAY_S:.0f} s at step {step} ({what})"
    return judge("store", step, what, quiet, ended, record=lab.record_of(name))


def disk(lab: Lab, quiet: Run, name: str, step: int, draw: random.Random) -> Outcome:
    """The disk of the run is full from a step on; the run says so and ends, and goes on once there is space."""
    run_bytes = sum(path.stat().st_size for path in lab.run_folder("quiet").rglob("*") if path.is_file())
    with _small_disk(lab.folder / "disk", 3 * run_bytes + (256 << 20)) as place:
        with _started(lab.process(name, {"track.storage": str(place)})) as run:
            began = time.monotonic()
            _reach(run, step)
            ballast = place / "ballast"
            _fill(ballast)
            code = run.wait(lab.limit_s)
            ballast.unlink()
            first = f"exit code {code}: {run.said()}"
            held = newest_checkpoint(str(place / f"{lab.experiment.name}-{name}" / "001"))
            if code == 0:
                raise NotHere(f"the run ended before the disk that was full from step {step} on mattered")
            done = steps_of(run)
            run.start()
            ended = lab.finish(run, done, began)
    what = f"disk full at step {step}"
    outcome = judge("disk", step, what, quiet, ended, held=held, record=lab.record_of(name))
    if outcome.verdict == "PASS" and (code != 1 or "space" not in first):
        return replace(outcome, verdict="HARD_FAIL", detail=f"{what}, which was not said: {first}")
    return outcome


def tracker(lab: Lab, quiet: Run, name: str, step: int, draw: random.Random) -> Outcome:
    """The MLflow server is killed, and started again after a while."""
    server = MlflowServer(lab.folder / "logs" / name / "mlflow")
    server.start()
    try:
        with _started(lab.process(name, {"track.uri": server.uri})) as run:
            began = time.monotonic()
            _reach(run, step)
            server.kill()
            back = threading.Timer(AWAY_S, server.start)
            back.start()
            ended = lab.finish(run, began=began)
            back.join()
        with _started(run):
            run.wait(lab.limit_s)  # complete already: what waits in the spool is sent
        return judge(
            "tracker",
            step,
            f"MLflow server killed at step {step}, back after {AWAY_S:.0f} s",
            quiet,
            ended,
            record=lab.record_of(name, server.uri),
        )
    finally:
        server.kill()


FAULTS: dict[str, Callable[[Lab, Run, str, int, random.Random], Outcome]] = {
    "worker": worker,
    "node": node,
    "driver": driver,
    "store": store,
    "disk": disk,
    "tracker": tracker,
}


@contextmanager
def _started(run: TrainProcess) -> Iterator[TrainProcess]:
    """The command, ended with all it started when the block is left."""
    run.start()
    try:
        yield run
    finally:
        run.stop()


def _reach(run: TrainProcess, step: int) -> None:
    if not run.until_step(step):
        raise NotHere(f"{ENDED} {step} (exit code {run.code}): {run.said()}")


def _gone(pids: list[int], timeout_s: float = 60) -> None:
    """Wait until processes are gone that a killed driver left to themselves."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.2)


def _object_store(lab: Lab, stack: contextlib.ExitStack) -> tuple[str, dict[str, str], dict[str, str]]:
    """Endpoint of an S3 server that has the data, what is needed to use it, and the keys of a run there."""
    uri = str(lab.forced["data.uri"])
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if uri.startswith("s3://"):
        if not endpoint.startswith("http://"):
            raise NotHere("faults are put in front of an S3 server at AWS_ENDPOINT_URL=http://…; it is not set so")
        return endpoint, {}, {"track.storage": storage.join(lab.experiment.track.storage, "chaos")}
    if "://" in uri:
        raise NotHere(f"{uri}: faults are put in front of S3 servers only")
    server = S3Server(lab.folder / "s3")
    stack.callback(server.kill)
    server.start()
    bucket = server.bucket()
    with _environment(server.environment):
        for entry in storage.list_entries(uri):
            storage.put(storage.join(bucket, "data", entry.path), storage.get(storage.join(uri, entry.path)))
    return server.endpoint, server.environment, {"data.uri": f"{bucket}/data", "track.storage": f"{bucket}/runs"}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Proxy:
    """The fault proxy as a process of its own, so that it takes no time from this one's threads."""

    def __init__(self, upstream: str) -> None:
        command = [sys.executable, "-m", "scalecv.testing.store_proxy", "--upstream", upstream]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint: str = self._answer()["endpoint"]

    def tell(self, faults: dict[str, Any]) -> dict[str, int]:
        """Set what happens to requests from now on; what was done so far."""
        pipe = cast(IO[str], self.process.stdin)
        pipe.write(json.dumps(faults) + "\n")
        pipe.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        return dict(json.loads(cast(IO[str], self.process.stdout).readline()))


@contextmanager
def _proxy(upstream: str) -> Iterator[_Proxy]:
    proxy = _Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.process.kill()
        proxy.process.wait()


@contextmanager
def _small_disk(place: Path, size_bytes: int) -> Iterator[Path]:
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere(f"a small disk needs the right to mount one: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def _fill(ballast: Path) -> None:
    """Write until nothing more fits."""
    chunk = b"\0" * (1 << 20)
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            while file.write(chunk) == len(chunk):
                pass
            if len(chunk) == 1:
                return
            chunk = chunk[: len(chunk) // 2]
