"""Whether a network can train on images of a size: its forward pass without numbers, before any data is read."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

from scalecv.errors import ConfigError
from scalecv.models.norms import alone

ONE_VALUE = "Expected more than 1 value per channel"
# Networks assert it, or their layers find that tensors do not fit each other.
OTHER_SIZE = (
    "must match",
    "Attempting to broadcast",
    "divisible",
    "doesn't match model",
    "multiple of",
    "Expected size",
)
TOO_SMALL = ("Output size is too small", "Kernel size can't be greater than actual input size", "must be non-zero")


def check_fits(model: nn.Module, shape: Sequence[int], arch: str) -> None:
    """Let tensors without storage go through a network in training mode; it is left as it was.

    Args:
        model: in training mode.
        shape: of one micro-batch, B, C, H, W.
        arch: its name, for the error.
    Raises: ConfigError: a layer would normalise single values, the image vanishes on its way, or has another size than
        the network takes.
    """
    images, _, height, width = shape
    every = [*model.named_parameters(), *model.named_buffers()]
    hollow = {name: torch.empty_like(tensor, device="meta") for name, tensor in every}
    try:
        with torch.no_grad(), alone(model):
            functional_call(model, hollow, (torch.empty(tuple(shape), device="meta"),))
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AssertionError) as error:
        said = str(error)
        if ONE_VALUE in said:
            raise ConfigError(
                f"model.arch={arch} comes down to single values in images of {width}x{height} pixels, {images} at a "
                "time, and there is nothing to normalise among one value: set train.batch and train.micro_batch so "
                "that a worker takes two and more at a time, model.norm=frozen, or a larger data.size_px"
            ) from None
        if any(words in said for words in TOO_SMALL):
            raise ConfigError(
                f"images of {width}x{height} pixels vanish on their way through model.arch={arch} "
                f"({said.splitlines()[0][:120]}): set data.size_px to twice their side or more, or take another network"
            ) from None
        if isinstance(error, AssertionError) or any(words in said for words in OTHER_SIZE):
            why = f" ({said.splitlines()[0][:120]})" if said else ""
            raise ConfigError(
                f"images of {width}x{height} pixels have no size that model.arch={arch} takes{why}: set data.size_px "
                "to a multiple of 32 or the size that the network is made for, or make it for this one where it has an "
                f"argument for it, as model.args={{img_size: {width}}} of timm or image_size of torchvision"
            ) from None
        # Anything else may be due to tensors without storage; if not, the first step says it.
