"""A gradient that is no number ends a run before the update; what it came from is saved."""

import json
import math
from typing import Any

import torch
from torch import distributed as dist

from scalecv import storage
from scalecv.errors import ScalecvError

FILE = "nonfinite.json"
Terms = list[dict[str, torch.Tensor]]
"""Loss terms of each row, of one micro-batch after the other."""


class NonFiniteError(ScalecvError):
    """The gradient or a weight is not a finite number."""


def is_finite_everywhere(loss: torch.Tensor) -> bool:
    """Whether the losses of all ranks are numbers; called on all of them."""
    bad = (~torch.isfinite(loss)).to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(bad)
    return not bad.item()


def stop(run: str, rank: int, at: dict[str, int], norm: float, ids: list[str], valid: list[bool], terms: Terms) -> None:
    """Save the global batch and end the run; called on all ranks.

    Args:
        run: URI of the run.
        rank: this rank.
        at: epoch and step, counted from 0, and the updates before.
        norm: of the gradient.
        ids: rows of this rank.
        valid: which of them count.
        terms: their losses.

    Raises: NonFiniteError: always.
    """
    columns = {name: torch.cat([part[name].reshape(-1) for part in terms]).tolist() for name in terms[0]}
    mine = [
        {"id": row, "loss": {name: _plain(values[place]) for name, values in columns.items()}}
        for place, row in enumerate(ids)
        if valid[place]
    ]
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    rows = [row for part in everyone for row in part]
    uri = storage.join(run, FILE)
    if rank == 0:
        told = {**at, "gradient_norm": _plain(norm), "rows": rows}
        storage.put(uri, json.dumps(told, indent=1).encode())
    if dist.is_initialized():
        dist.barrier()
    bad = [row["id"] for row in rows if any(isinstance(value, str) for value in row["loss"].values())]
    which = (
        f"the loss of {len(bad)} rows is no number: {', '.join(bad[:4])}" if bad else "the loss of each row is finite"
    )
    raise NonFiniteError(
        f"the gradient is {norm} at epoch {at['epoch'] + 1}, step {at['step'] + 1}: the weights were not updated. "
        f"{which}; all rows of the batch are in {storage.without_secrets(uri)}. "
        "Lower train.lr, set train.clip_norm, or look at these rows"
    )


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
