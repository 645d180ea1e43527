"""A network that sees its images enlarged: the stage between a batch and the network, on the device, never stored.

In training the logits keep the enlarged size, where the truth is enlarged too, by nearest neighbour. Otherwise they
are brought back to the native size, so that scores are of the same pixels whatever the factor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scalecv.models.upscalers import bicubic

LEAST = 1e-38
"""Smallest mean probability whose logarithm is taken: about the smallest float32."""


class Bicubic(nn.Module):
    """Enlarges [B, C, h, w] by a factor."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, f*h, f*w]."""
        return bicubic(images, self.factor)


class SuperResolution(nn.Module):
    """Enlarges by a frozen network, as often as its own factor asks for."""

    gain: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, times: int, ours: Sequence[Sequence[float]], its: Sequence[Sequence[float]]
    ) -> None:
        """Freeze a network.

        Args:
            network: gives [B, C, k*h, k*w].
            times: how often it is applied.
            ours: mean and std of each band, as the images that come are normalised.
            its: mean and std of each band, as the network was trained.
        """
        super().__init__()
        self.network, self.times = network.eval().requires_grad_(False), times
        (mean, std), (mean_its, std_its) = (torch.tensor(pair, dtype=torch.float64) for pair in (ours, its))
        for name, value in (("gain", std / std_its), ("shift", (mean - mean_its) / std_its)):
            self.register_buffer(name, value.float().view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "SuperResolution":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, f*h, f*w], both normalised as `ours`."""
        larger = images * self.gain + self.shift
        for _ in range(self.times):
            larger = self.network(larger)
        return (larger.float() - self.shift) / self.gain


class Enlarged(nn.Module):
    """A network behind a stage that enlarges its images."""

    def __init__(self, network: nn.Module, enlarge: nn.Module, factor: int) -> None:
        super().__init__()
        self.network, self.enlarge, self.factor = network, enlarge, factor

    def forward(self, images: Tensor) -> Tensor:
        """Logits of [B, C, h, w]: [B, K], or in training [B, K, f*h, f*w], otherwise [B, K, h, w]."""
        with torch.no_grad():
            larger = self.enlarge(images)
        logits: Tensor = self.network(larger)
        return logits if self.training else to_native(logits, self.factor)


def to_native(logits: Tensor, factor: int) -> Tensor:
    """Logits of the mean probability of each native pixel, float32.

    Args:
        logits: [B, K, f*h, f*w], or [B, 1, f*h, f*w] for two classes; [B, K] stays as it is.
        factor: f.
    Returns: [B, K, h, w] or [B, 1, h, w].
    """
    if logits.ndim != 4:
        return logits
    scores = logits.float()
    if scores.shape[1] == 1:
        here, not_here = (_mean(torch.sigmoid(z), factor).log() for z in (scores, -scores))
        return here - not_here
    return _mean(torch.softmax(scores, 1), factor).log()


def truth(batch: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """The batch with its mask, int64 [B, h, w], at the enlarged size: each pixel as it is, f*f times."""
    out = dict(batch)
    if factor > 1 and "mask" in out:
        out["mask"] = out["mask"].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return out


def _mean(probability: Tensor, factor: int) -> Tensor:
    return functional.avg_pool2d(probability, factor).clamp_min(LEAST)
