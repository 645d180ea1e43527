"""Gradients that are the same bits on 1, 2 or 4 workers: fixed logical shards, summed in one fixed tree.

Plain DDP adds what each rank computed, so another number of ranks adds in another order and rounds otherwise; an
optimiser such as Adam makes that visible within one epoch. Here a global batch is always cut into SHARDS parts, each
part runs alone with random numbers of its own, and the parts are added as a binary tree: ((0 + 1) + (2 + 3)).
A rank owns neighbouring parts, so its own sum is a node of that tree. What it costs: smaller batches in each
forward pass, a fixed number of threads (one, unless train.threads says otherwise), and all gradients gathered
instead of reduced.
"""

import os
import time
from collections.abc import Callable

import torch
from torch import distributed as dist

from scalecv.errors import ConfigError
from scalecv.train.checks import SHARDS


def gradients(
    model: torch.nn.Module, rows: int, rank: int, ranks: int, backward: Callable[[slice, int], torch.Tensor]
) -> torch.Tensor:
    """Leave the gradient of the whole global batch in `model`, the same bits on every rank and for any number of ranks.

    Args:
        model: its gradients are written over.
        rows: rows of this rank.
        rank: this rank.
        ranks: how many there are; divides SHARDS.
        backward: computes the gradient of some of this rank's rows for a logical shard; returns the sum of losses.
    Returns: sum of the losses of this rank's rows.
    """
    mine, size = SHARDS // ranks, rows // (SHARDS // ranks)
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts, total = [], torch.zeros((), device=parameters[0].device)
    for part in range(mine):
        model.zero_grad(set_to_none=True)
        total += backward(slice(part * size, (part + 1) * size), rank * mine + part)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        parts.append(torch.cat(flat))
    whole = _tree(parts)
    if ranks > 1:
        everyone = [torch.empty_like(whole) for _ in range(ranks)]
        dist.all_gather(everyone, whole)
        whole = _tree(everyone)
    for parameter, gradient in zip(parameters, torch.split(whole, [p.numel() for p in parameters]), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(gradient.view_as(parameter))  # of one memory format
    return total


def check(model: torch.nn.Module) -> None:
    """Refuse a network that `model.norm` could not rid of batch statistics.

    Raises: ConfigError: with the names of such layers.
    """
    kind = torch.nn.modules.batchnorm._BatchNorm
    found = [name for name, layer in model.named_modules() if isinstance(layer, kind) and layer.training]
    if found:
        raise ConfigError(
            f"train.exact=true: {len(found)} layers learn from the statistics of a batch, such as {found[0]} "
            f"({type(model.get_submodule(found[0])).__name__}); model.norm cannot replace them, take another network"
        )


def use_fixed_kernels(device: str) -> None:
    """Have CUDA take kernels that always add in one order; one that has none is an error of torch that names it."""
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def cost(
    model: torch.nn.Module, exact: Callable[[], object], plain: Callable[[], object], threads: int
) -> tuple[float, float]:
    """Seconds that the gradients of one batch take by `exact`, and by `plain` with its threads: the second time each.

    `plain` leaves the sum of this rank's rows; its gradients are then added over the ranks as DDP does. Buffers of the
    model are as before afterwards, and it has no gradients.
    """
    kept, fixed = [buffer.clone() for buffer in model.buffers()], torch.get_num_threads()

    def reduced() -> None:
        plain()
        if dist.is_initialized():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

    try:
        taken = _seconds(model, exact)
        torch.set_num_threads(threads)
        return taken, _seconds(model, reduced)
    finally:
        torch.set_num_threads(fixed)
        model.zero_grad(set_to_none=True)
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)


def _seconds(model: torch.nn.Module, compute: Callable[[], object]) -> float:
    for _ in range(2):  # the first time, kernels are chosen and memory is taken
        model.zero_grad(set_to_none=True)
        _settle()
        began = time.perf_counter()
        compute()
        _settle()
    return time.perf_counter() - began


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _tree(parts: list[torch.Tensor]) -> torch.Tensor:
    while len(parts) > 1:
        parts = [parts[at] + parts[at + 1] for at in range(0, len(parts), 2)]
    return parts[0]
