"""Networks that enlarge images, and the classical ways to enlarge and to reduce them.

B images, C channels, f the factor. A network takes float [B, C, h, w], normalised, and gives [B, C, f*h, f*w]: the
bicubic enlargement plus what it has learnt to add. Its last layer starts at zero, so an untrained one is bicubic.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scalecv.errors import ConfigError, nearest

ARCHITECTURES = {"espcn": {"width": 64, "blocks": 1, "factor": 2}, "edsr": {"width": 32, "blocks": 4, "factor": 2}}
"""Name -> its arguments and their defaults."""
FACTORS = (2, 4)
SLOPE = 0.1
"""Of activations below zero: with none, a first large step switched every one off for good."""
ADDED = 0.1
"""What is learnt is added by this share: it is small against a normalised image, and an optimiser's steps are not."""
MOST = 1024
"""Largest width and number of blocks."""


def bicubic(images: Tensor, factor: int) -> Tensor:
    """[B, C, h, w] to [B, C, f*h, f*w] by Keys' cubic with a = -0.5, as Pillow and MATLAB have it."""
    return functional.interpolate(images, scale_factor=float(factor), mode="bicubic", antialias=True)


def reduced(images: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] to [B, C, H/f, W/f] by the same cubic, widened by the factor, so that nothing is aliased."""
    size = (images.shape[-2] // factor, images.shape[-1] // factor)
    return functional.interpolate(images, size=size, mode="bicubic", antialias=True)


class Espcn(nn.Module):
    """Convolutions at the small size, then each group of f*f channels becomes one larger (Shi et al. 2016)."""

    def __init__(self, channels: int, width: int, blocks: int, factor: int) -> None:
        """`blocks` convolutions of `width` channels stand between the first and the last."""
        super().__init__()
        self.factor = factor
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 5, padding=2), nn.LeakyReLU(SLOPE, inplace=True)]
        for _ in range(blocks):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(SLOPE, inplace=True)]
        self.body = nn.Sequential(*layers)
        self.last = _from_zero(nn.Conv2d(width, channels * factor**2, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, f*h, f*w]."""
        added = functional.pixel_shuffle(self.last(self.body(images)), self.factor)
        return bicubic(images, self.factor) + ADDED * added


class Residual(nn.Module):
    """Two convolutions whose result is added to what came in; no normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, width, h, w] to the same shape."""
        out: Tensor = features + self.body(features)
        return out


class Edsr(nn.Module):
    """A row of residual blocks without normalisation at the small size (after Lim et al. 2017)."""

    def __init__(self, channels: int, width: int, blocks: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.Sequential(*[Residual(width) for _ in range(blocks)], nn.Conv2d(width, width, 3, padding=1))
        self.last = _from_zero(nn.Conv2d(width, channels * factor**2, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, f*h, f*w]."""
        features = self.first(images)
        added = functional.pixel_shuffle(self.last(features + self.body(features)), self.factor)
        return bicubic(images, self.factor) + ADDED * added


def upscaler(arch: str, *, in_channels: int, outputs: int, encoder: str, args: dict[str, Any]) -> nn.Module:
    """A network that enlarges images of `in_channels` bands; `encoder` is not looked at.

    Raises: ConfigError: an argument that is unknown or out of range, or another number of outputs than of channels.
    """
    if outputs != in_channels:
        raise ConfigError(f"model.arch={arch} gives the {in_channels} bands that it takes, not {outputs}")
    return (Espcn if arch == "espcn" else Edsr)(in_channels, **_arguments(arch, args))


def factor_of(arch: str, args: Mapping[str, Any]) -> int:
    """How many times a network enlarges the side of an image; one's own says it in model.args.factor, else 2."""
    return _arguments(arch, dict(args))["factor"] if arch in ARCHITECTURES else int(args.get("factor", 2))


def _arguments(arch: str, args: dict[str, Any]) -> dict[str, int]:
    known = ARCHITECTURES[arch]
    for name, value in args.items():
        if name not in known:
            raise ConfigError(
                f"unknown model.args.{name} of {arch}{nearest(name, list(known)) or ''}: {', '.join(known)}"
            )
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise ConfigError(f"model.args.{name}={value} of {arch}: expected a whole number from 1 to {MOST}")
    found = {**known, **args}
    if found["factor"] not in FACTORS:
        raise ConfigError(f"model.args.factor={found['factor']} of {arch}: expected 2 or 4")
    return found


def _from_zero(layer: nn.Conv2d) -> nn.Conv2d:
    with torch.no_grad():
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    return layer
