"""What lies under a run's name: numbered attempts, each with the experiment it started from, and one owner at a time.

    STORAGE/NAME/lease.json             who trains under this name now
    STORAGE/NAME/001/run.json           experiment, data version and key of the MLflow run
                     checkpoints/ bundles/ pictures/ spool.jsonl
                     result.json        when it ended by itself
`--new` makes the next number; everything else goes on with the highest one.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalecv import cache, redact, storage
from scalecv.config import Experiment, flatten
from scalecv.errors import ConfigError, ScalecvError, UserError
from scalecv.shards.store import Dataset, open_dataset
from scalecv.train.lease import Lease, hold

log = logging.getLogger("scalecv.runs")

LOOK_S = 60.0
RECORDED_ONLY = ("question", "data.get", "track.experiment", "track.uri")
"""Texts that nothing is computed from: a secret in them is left out; in the others it is refused."""


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
    weights: str | None = None
    """Where the starting weights lie that runs:/ID or models:/NAME@ALIAS stood for when the attempt began."""


def home(experiment: Experiment) -> str:
    """Where all attempts of a name lie."""
    return storage.join(storage.absolute(experiment.track.storage), experiment.name)


def open_run(
    experiment: Experiment,
    approve: Callable[[Dataset], None],
    *,
    find_weights: Callable[[str], str | None] = lambda _: None,
    new: bool = False,
) -> Run:
    """The attempt to work on: the highest one if it fits the experiment, else a first or new one.

    `approve` raises where the experiment cannot run on the data; then no attempt begins. `find_weights` says where
    the starting weights lie that a record's name stands for; an attempt keeps it, and does not ask again.

    Raises: ConfigError: the name is taken by another experiment, or the data changed under it.
    """
    _check_no_secret(experiment)
    last = _last(experiment)
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
    weights = find_weights(experiment.model.weights) if experiment.model.weights else None
    uri, key = storage.join(home(experiment), f"{last + 1:03d}"), uuid.uuid4().hex
    told = {
        "key": key,
        "identity": experiment.identity(),
        "experiment": redact.clean_tree(experiment.model_dump(mode="json")),
        "dataset": {"version": dataset.version, "fingerprint": dataset.manifest.fingerprint},
        "weights": weights,
    }
    if not storage.put_if_absent(storage.join(uri, "run.json"), json.dumps(told, indent=1).encode()):
        raise UserError(f"{uri} was started by another command at the same moment: look at that one, or run again")
    return Run(uri, key, dataset, goes_on=False, result=None, weights=weights)


def withdraw(run: Run) -> None:
    """Take back an attempt that was refused before its first step; one that has checkpoints is left as it is."""
    if storage.list_names(storage.join(run.uri, "checkpoints")):
        return
    shutil.rmtree(local_folder(run), ignore_errors=True)
    if not storage.is_local(run.uri):
        storage.delete(storage.join(run.uri, one.path) for one in storage.list_entries(run.uri))


def newest(experiment: Experiment) -> str | None:
    """URI of the attempt that the same command would go on with; None where there is none."""
    last = _last(experiment)
    return storage.join(home(experiment), f"{last:03d}") if last else None


def begin_with(experiment: Experiment, parent: Experiment) -> None:
    """Let a run begin with the newest checkpoint of another that has the same network; nothing if it began already.

    Raises: ScalecvError: the other has no checkpoint.
    """
    from scalecv.train import checkpoint

    place = storage.join(home(experiment), "001")
    if checkpoint.complete(place)[0]:
        return
    theirs = newest(parent)
    found, parts, _ = checkpoint.newest(theirs) if theirs else (None, None, [])
    if found is None or parts is None:
        raise ScalecvError(f"{home(parent)} has no checkpoint that is whole: nothing to begin {experiment.name} with")
    checkpoint.save(place, parts, found.updates, found.metric)


def _last(experiment: Experiment) -> int:
    """The highest number of an attempt; 0 where there is none."""
    return max((int(n) for n in storage.list_names(home(experiment)) if re.fullmatch(r"\d{3}", n)), default=0)


def _check_no_secret(experiment: Experiment) -> None:
    """Raises: ConfigError: a key that the run depends on holds a secret; it would stand in each bundle and record."""
    for key, value in flatten(experiment.model_dump(mode="json")).items():
        if isinstance(value, str) and key not in RECORDED_ONLY and redact.clean(value) != value:
            variable = redact.variable_in(value)
            what = f"the value of {variable}" if variable else "a login, a signature or a credential"
            raise ConfigError(
                f"{key} holds {what}, and every bundle and record of the run would hold it, too: take it out of the "
                "experiment and let the code that needs it read the environment"
            )


def _is_same(experiment: Experiment, told: dict[str, Any]) -> bool:
    """Whether an attempt was begun by this experiment on the data as it is now."""
    now = open_dataset(experiment.data.uri, experiment.data.version)
    return bool(
        told["identity"] == experiment.identity() and told["dataset"]["fingerprint"] == now.manifest.fingerprint
    )


def _go_on(experiment: Experiment, uri: str, told: dict[str, Any]) -> Run:
    if told["identity"] != experiment.identity():
        was, now = flatten(told["experiment"]), flatten(experiment.model_dump(mode="json"))
        same: tuple[str, ...] = (
            "scale.",
            "track.",
            "question",
            "data.uri",
            "data.get",
            "data.reader",
            "data.decode",
            "data.decode_threads",
            "data.max_bad",
            "train.epochs",
        )
        if "gpu" in (was.get("data.decode"), now.get("data.decode")):  # whose pixels are others
            same = tuple(key for key in same if key != "data.decode")
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
    return Run(uri, told["key"], dataset, goes_on=True, result=result, weights=told.get("weights"))


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
    return cache.user_folder() / "runs"


def lease(experiment: Experiment, say: Callable[[str], None] = log.warning) -> contextlib.AbstractContextManager[Lease]:
    """Hold a name while training (see `train.lease`); `say` is told where one has to wait for that.

    Raises: UserError: somebody else holds it. ScalecvError: somebody took it over while this command ran.
    """
    return hold(storage.join(home(experiment), "lease.json"), experiment.name, say)


def check_shared(uri: str, nodes: Sequence[str]) -> None:
    """Let every node look for a file that this machine writes, where storage is a path and there are several nodes.

    Args:
        uri: track.storage or data.uri; a place on object storage is shared by nature, and nothing is done.
        nodes: Ray's IDs of the nodes that training may use, as `ray.nodes()` gives them; Ray is connected.
    Raises: ConfigError: a node does not see the file, so that what its workers write would be lost.
    """
    if not storage.is_local(uri) or len(nodes) < 2:
        return
    probe = storage.join(storage.absolute(uri), f".shared-{uuid.uuid4().hex}")
    storage.put(probe, b"probe")
    try:
        blind = [node for node, sees in zip(nodes, _seen_from(probe, nodes), strict=True) if not sees]
    finally:
        storage.delete([probe])
    if blind:
        raise ConfigError(
            f"{storage.absolute(uri)} is a path of this machine, and {len(blind)} of {len(nodes)} nodes do not see "
            f"what lies there (such as node {blind[0][:12]}): set it to s3://BUCKET/PATH (gs://, az://), or to a "
            "folder that all nodes share"
        )


def _seen_from(path: str, nodes: Sequence[str]) -> list[bool]:
    """Whether a file is there, as each node sees it; a node that does not answer does not see it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=1)(os.path.exists)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote(path) for n in nodes
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=LOOK_S)
    seen = []
    for ref in asked:
        try:
            seen.append(ref in answered and bool(ray.get(ref)))
        except ray.exceptions.RayError:
            seen.append(False)
    return seen
