"""Starting weights of a run: read once, kept by their hash, never asked for again once there is a checkpoint."""

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from scalecv import storage
from scalecv.artifacts import bundle
from scalecv.errors import ConfigError
from scalecv.models.library import imagenet_state
from scalecv.models.weights import Loaded, load_state, read_state
from scalecv.train.job import Job

if TYPE_CHECKING:
    import torch

FILE = "starting_weights.json"


def start_from(model: "torch.nn.Module", job: Job, rank: int) -> tuple[Loaded, dict[str, str]]:
    """Copy the starting weights of a run's experiment into its network.

    Returns: what was taken, and the tags that say which weights these were.
    Raises: ConfigError: they could not be had, do not fit, or are not those that this run began with.
    """
    wanted = job.experiment.model
    where = job.weights or str(wanted.weights)
    if wanted.weights == "imagenet":
        state, where = imagenet_state(wanted.arch, wanted.encoder, wanted.args), "imagenet"
    else:
        state = read_state(where)
    digest = bundle.weights_hash(state)
    _check_same(job.run, where, digest, rank)
    loaded = load_state(model, state, where, init=wanted.in_channels_init, scope=wanted.weights_scope)
    tags = {
        "scalecv.starting_weights": storage.without_secrets(where),
        "scalecv.starting_weights_hash": digest,
        "scalecv.starting_weights_taken": str(loaded),
    }
    return loaded, tags


def _check_same(run: str, where: str, digest: str, rank: int) -> None:
    """Keep the hash with the run; refuse other weights at the same place when it starts anew before a checkpoint."""
    file = storage.join(run, FILE)
    told = {}
    with suppress(FileNotFoundError):
        told = json.loads(storage.get(file))
    if told.get("weights_hash", digest) != digest:
        raise ConfigError(
            f"the weights at {storage.without_secrets(where)} are not those that {run} began with (hash {digest[:12]}, "
            f"was {told['weights_hash'][:12]}): bring them back, or start over with --new"
        )
    if not told and rank == 0:
        kept = {"uri": storage.without_secrets(where), "weights_hash": digest}
        storage.put(file, json.dumps(kept, indent=1).encode())
