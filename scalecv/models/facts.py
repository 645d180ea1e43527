"""What a network costs: parameters, size and arithmetic."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def model_facts(model: nn.Module, input_shape: Sequence[int]) -> dict[str, float]:
    """Facts of a network; it is left as it was, in its mode and on its device.

    Args:
        input_shape: C, H, W of one image.
    Returns: parameters (count), trainable (count), size_mb (weights and buffers, 1e6 bytes), flops (floating-point
        operations of the forward pass of one image, two per multiply-add; convolutions, matrix products, attention).
    """
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    device = parameters[0].device if parameters else torch.device("cpu")
    dtype = parameters[0].dtype if parameters else torch.float32
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_shape, device=device, dtype=dtype))
    finally:
        for module, training in modes.items():
            module.training = training
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "size_mb": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        "flops": counter.get_total_flops(),
    }
