"""How the first layer of starting weights becomes that of other bands: one choice for each band, made explicit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scalecv.errors import ConfigError

NAMED = ("red", "green", "blue")
Init = str | Sequence[str]
"""copy, mean, zero, or for each band one of red, green, blue, mean, zero."""


def adapt_channels(weight: Tensor, channels: int, init: Init = "copy") -> Tensor:
    """Weights [O, C, k, k] of a first convolution for `channels` input channels, [O, channels, k, k].

    copy takes the given channels in turn, mean gives each channel their mean, zero keeps them and adds channels of
    zeros; a sequence chooses for each channel. What is not zero is scaled by C / (channels that are not zero): an image
    with equal values in all of these gives what it gave before.

    Raises: ConfigError: a sequence that does not fit the channels, or is for weights of three bands only.
    """
    before = weight.shape[1]
    columns = _columns(before, channels, init)
    used = sum(column != "zero" for column in columns)
    mean = weight.mean(1)
    special = {"mean": mean, "zero": torch.zeros_like(mean)}
    picked = [weight[:, at] if isinstance(at, int) else special[at] for at in columns]
    return torch.stack(picked, 1) * (before / used)


def _columns(before: int, channels: int, init: Init) -> list[int | str]:
    """Of each new channel: the number of the given one, mean, or zero."""
    if init == "copy":
        return [at % before for at in range(channels)]
    if init == "mean":
        return ["mean"] * channels
    if init == "zero":
        return [at if at < before else "zero" for at in range(channels)]
    if len(init) != channels:
        raise ConfigError(f"model.in_channels_init names {len(init)} bands, the images have {channels}: name each")
    if before != len(NAMED) and set(init) & set(NAMED):
        raise ConfigError(
            f"model.in_channels_init names red, green or blue, but the starting weights are for {before} bands: "
            "set it to copy, mean or zero"
        )
    if set(init) == {"zero"}:
        raise ConfigError("model.in_channels_init is zero for every band: the network would see nothing")
    return [NAMED.index(one) if one in NAMED else one for one in init]
