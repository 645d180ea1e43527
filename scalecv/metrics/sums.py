"""Sums that grow batch by batch and are added up once over the ranks."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Sums = dict[str, Tensor]


def add(sums: Sums, more: Mapping[str, Tensor]) -> None:
    """Add `more` to the growing `sums`, name by name; a new name starts from what it brings."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def over_ranks(sums: Mapping[str, Tensor]) -> Sums:
    """The sums over all ranks, on the CPU; without a process group the sums themselves.

    Whole numbers are added as int64, others as float64, in at most two exchanges. Every rank calls this with the
    same names and shapes: a rank without batches starts from zeros.
    """
    whole = {name: value.detach() for name, value in sorted(sums.items()) if not value.is_floating_point()}
    real = {name: value.detach() for name, value in sorted(sums.items()) if value.is_floating_point()}
    out = _reduced(whole, torch.int64) | _reduced(real, torch.float64)
    return {name: out[name] for name in sums}


def everywhere(mine: Any) -> list[Any]:
    """What each rank has, by rank, on every rank; without a process group the own alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _reduced(sums: Mapping[str, Tensor], dtype: torch.dtype) -> Sums:
    if not sums:
        return {}
    joined = torch.cat([value.flatten().to("cpu", dtype) for value in sums.values()])
    if dist.is_available() and dist.is_initialized():
        # NCCL adds only what lies on this rank's GPU.
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        joined = joined.to(device)
        dist.all_reduce(joined)
        joined = joined.cpu()
    parts = torch.split(joined, [value.numel() for value in sums.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}
