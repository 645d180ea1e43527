"""What lies under a run's name: numbered attempts, each with the experiment it started from, and one owner at a time.

    STORAGE/NAME/lease.json             who trains under this name now
    STORAGE/NAME/001/run.json           experiment, data version and key of the MLflow run
                     checkpoints/ bundles/ pictures/ spool.jsonl
                     result.json        when it ended by itself
`--new` makes the next number; everything else goes on with the highest one.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalecv import storage
from scalecv.config import Experiment, flatten
from scalecv.errors import ConfigError, UserError
from scalecv.shards.store import Dataset, open_dataset

LEASE_S = 60.0
RENEW_S = 15.0


@dataclass(frozen=True)
class Run:
    """One attempt under a name."""

    uri: str
    key: str
    """Unique; the MLflow run carries it as a tag."""
    dataset: Dataset
    goes_on: bool
    """Whether it was there before."""
    result: dict[str, Any] | None
    """What it ended with, if it ended."""


def home(experiment: Experiment) -> str:
    """Where all attempts of a name lie."""
    return storage.join(storage.absolute(experiment.track.storage), experiment.name)


def open_run(experiment: Experiment, approve: Callable[[Dataset], None], *, new: bool = False) -> Run:
    """The attempt to work on: the highest one if it fits the experiment, else a first or new one.

    `approve` raises where the experiment cannot run on the data; then no attempt begins.

    Raises: ConfigError: the name is taken by another experiment, or the data changed under it.
    """
    numbers = [int(n) for n in storage.list_names(home(experiment)) if re.fullmatch(r"\d{3}", n)]
    last = max(numbers, default=0)
    if last and not new:
        uri = storage.join(home(experiment), f"{last:03d}")
        try:
            told = json.loads(storage.get(storage.join(uri, "run.json")))
        except FileNotFoundError:
            told = None  # a crash before the first word: take the number over
        if told is None:
            last -= 1
        elif storage.list_names(storage.join(uri, "checkpoints")) or _is_same(experiment, told):
            run = _go_on(experiment, uri, told)
            approve(run.dataset)
            return run
        # Else: an attempt that never saved anything, with a mistake in it or its data that was mended since.
    dataset = open_dataset(experiment.data.uri, experiment.data.version)
    approve(dataset)
    uri, key = storage.join(home(experiment), f"{last + 1:03d}"), uuid.uuid4().hex
    told = {
        "key": key,
        "identity": experiment.identity(),
        "experiment": experiment.model_dump(mode="json"),
        "dataset": {"version": dataset.version, "fingerprint": dataset.manifest.fingerprint},
    }
    if not storage.put_if_absent(storage.join(uri, "run.json"), json.dumps(told, indent=1).encode()):
        raise UserError(f"{uri} was started by another command at the same moment: look at that one, or run again")
    return Run(uri, key, dataset, goes_on=False, result=None)


def _is_same(experiment: Experiment, told: dict[str, Any]) -> bool:
    """Whether an attempt was begun by this experiment on the data as it is now."""
    now = open_dataset(experiment.data.uri, experiment.data.version)
    return bool(
        told["identity"] == experiment.identity() and told["dataset"]["fingerprint"] == now.manifest.fingerprint
    )


def _go_on(experiment: Experiment, uri: str, told: dict[str, Any]) -> Run:
    if told["identity"] != experiment.identity():
        was, now = flatten(told["experiment"]), flatten(experiment.model_dump(mode="json"))
        same = (
            "scale.",
            "track.",
            "question",
            "data.uri",
            "data.get",
            "data.reader",
            "data.decode_threads",
            "train.epochs",
        )
        differs = [k for k in sorted({*was, *now}) if was.get(k) != now.get(k) and not k.startswith(same)]
        words = ", ".join(f"{k} was {was.get(k)!r} and is {now.get(k)!r}" for k in differs[:3])
        raise ConfigError(
            f"name={experiment.name} belongs to another experiment at {uri}: {words}. "
            "Give this one another name, or start over with --new"
        )
    pinned = told["dataset"]
    dataset = open_dataset(experiment.data.uri, pinned["version"])
    if dataset.manifest.fingerprint != pinned["fingerprint"]:
        raise ConfigError(
            f"{experiment.data.uri} version {pinned['version']} is not the data that {uri} was trained on (fingerprint "
            f"{dataset.manifest.fingerprint[:12]}, was {pinned['fingerprint'][:12]}): start over with --new"
        )
    result = None
    with contextlib.suppress(FileNotFoundError):
        result = json.loads(storage.get(storage.join(uri, "result.json")))
    return Run(uri, told["key"], dataset, goes_on=True, result=result)


def local_folder(run: Run) -> Path:
    """A folder of this machine for the run's spool: its own where it is local, else below the user's cache."""
    if storage.is_local(run.uri):
        folder = Path(run.uri)
    else:
        folder = cache_folder() / run.key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_folder() -> Path:
    """Where the spools of runs on object storage lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalecv" / "runs"


@contextlib.contextmanager
def lease(experiment: Experiment) -> Iterator[None]:
    """Hold a name while training; a second live run of one name is refused.

    The lease is renewed by a thread. One whose process is gone from this machine is taken over at once, one of
    another machine after LEASE_S without renewal.
    Raises: UserError: somebody else holds it.
    """
    uri = storage.join(home(experiment), "lease.json")
    nonce = uuid.uuid4().hex
    _claim(uri, nonce, experiment.name)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(Exception):
                entry = storage.head(uri)
                if entry and json.loads(storage.get(uri))["nonce"] == nonce:
                    storage.put_if_match(uri, _ticket(nonce), entry.etag)  # never over somebody else's

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            if json.loads(storage.get(uri))["nonce"] == nonce:
                storage.delete([uri])


def _claim(uri: str, nonce: str, name: str) -> None:
    if storage.put_if_absent(uri, _ticket(nonce)):
        return
    entry = storage.head(uri)
    try:
        held = json.loads(storage.get(uri))
    except (FileNotFoundError, ValueError):
        held = {}
    if entry and _is_stale(held) and storage.put_if_match(uri, _ticket(nonce), entry.etag):
        return
    if entry is None and storage.put_if_absent(uri, _ticket(nonce)):
        return
    who = f"process {held.get('pid')} on {held.get('host')}" if held else "another process"
    raise UserError(
        f"name={name} is being trained by {who} ({storage.without_secrets(uri)}): wait for it, or use another name"
    )


def _ticket(nonce: str) -> bytes:
    pid = os.getpid()
    told = {"nonce": nonce, "host": _host(), "pid": pid, "started": _started(pid), "renewed": time.time()}
    return json.dumps(told).encode()


def _is_stale(held: dict[str, Any]) -> bool:
    if held.get("host") == _host():
        return _started(int(held.get("pid", 0))) != held.get("started")
    return time.time() - float(held.get("renewed", 0)) > LEASE_S


def _host() -> str:
    """This boot of this machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip()[:8] if boot.exists() else ''}"


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; empty if it is gone or that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
