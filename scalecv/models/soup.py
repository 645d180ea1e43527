"""The mean of the weights of networks of one shape, as one network."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from scalecv.models.norms import BatchNorm

State = dict[str, Tensor]


def mean_of(states: Sequence[State]) -> State:
    """The mean of each tensor, in its dtype; whole numbers are those of the first.

    Args:
        states: weights of networks of one shape.
    Raises: ValueError: names or shapes differ.
    """
    first = states[0]
    if any({n: t.shape for n, t in one.items()} != {n: t.shape for n, t in first.items()} for one in states):
        raise ValueError("weights of networks of several shapes have no mean")
    out = {}
    for name, value in first.items():
        if value.is_floating_point():
            value = torch.stack([one[name].double() for one in states]).mean(0).to(value.dtype)
        out[name] = value.clone()
    return out


@torch.no_grad()
def renew_statistics(model: nn.Module, images: Iterable[Tensor]) -> int:
    """Let the batch normalisations of a network take their statistics from images; frozen ones keep theirs.

    Means of statistics are not the statistics of mean weights.

    Args:
        model: changed in place, left in evaluation mode.
        images: batches [B, C, H, W] as training normalises them; not looked at where nothing has to be renewed.
    Returns: how many layers have new ones.
    """
    model.train()
    layers = [m for m in model.modules() if isinstance(m, BatchNorm) and m.training and m.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
    for batch in images if layers else ():
        model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
    return len(layers)
