"""What a network costs: parameters, size, arithmetic, and the time of one image."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    image = _one_image(model, input_shape)
    with _evaluating(model), FlopCounterMode(display=False) as counter:
        model(image)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "size_mb": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        "flops": counter.get_total_flops(),
    }


WARM_UP, MOST, FEWEST, ENOUGH_S = 3, 30, 5, 0.5
"""Images before time counts; images that are timed, as long as they take no more than ENOUGH_S, and at least FEWEST."""


def latency_ms(model: nn.Module, input_shape: Sequence[int]) -> tuple[float, float]:
    """Milliseconds of the forward pass of a batch of one image, on the network's device: median and 95th percentile.

    The first passes do not count (kernels are chosen, memory is taken), and a GPU has finished before each look at the
    clock. It says how long one image takes that comes alone; in larger batches an image takes less.

    Args:
        model: left as it was.
        input_shape: C, H, W of the image.
    """
    image, took = _one_image(model, input_shape), list[float]()
    with _evaluating(model):
        for _ in range(WARM_UP):
            model(image)
        while len(took) < FEWEST or (len(took) < MOST and sum(took) < ENOUGH_S):
            _settle(image.device)
            began = time.perf_counter()
            model(image)
            _settle(image.device)
            took.append(time.perf_counter() - began)
    p50, p95 = torch.quantile(torch.tensor(took, dtype=torch.float64) * 1000, torch.tensor([0.5, 0.95]).double())
    return float(p50), float(p95)


def _one_image(model: nn.Module, input_shape: Sequence[int]) -> torch.Tensor:
    first = next(model.parameters(), torch.zeros(0))
    return torch.zeros(1, *input_shape, device=first.device, dtype=first.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module then has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
