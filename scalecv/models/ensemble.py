"""Networks that answer together: the weighted mean of their probabilities, as logits.

B images, C channels, K classes, H x W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scalecv.models.enlarged import LEAST

Moments = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""


class Member(nn.Module):
    """A network behind what makes its images of those of the ensemble: other bands, normalisation or size."""

    gain: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        channels: Sequence[int],
        ours: Moments,
        its: Moments,
        *,
        scale: tuple[float, float] = (1.0, 1.0),
        multiple: int = 1,
    ) -> None:
        """Wrap a network.

        Args:
            network: gives logits of its own images.
            channels: places of its channels among those that come.
            ours: as the images that come are normalised.
            its: as its own are.
            scale: height and width of its own images, in those that come.
            multiple: sides that were scaled are multiples of this.
        """
        super().__init__()
        self.network, self.channels, self.scale, self.multiple = network, list(channels), scale, multiple
        (mean, std), (mean_its, std_its) = (torch.tensor(pair, dtype=torch.float64) for pair in (ours, its))
        mean, std = mean[self.channels], std[self.channels]
        for name, value in (("gain", std / std_its), ("shift", (mean - mean_its) / std_its)):
            self.register_buffer(name, value.float().view(1, -1, 1, 1), persistent=False)
        self._is_same = self.channels == list(range(len(ours[0]))) and bool((mean == mean_its).all())
        self._is_same &= bool((std == std_its).all())

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, K] or [B, K, H, W] of images [B, C, H, W]; those of other pixels are interpolated."""
        own = images if self._is_same else images[:, self.channels] * self.gain + self.shift
        if self.scale != (1.0, 1.0):
            sides = [self._side(side, scale) for side, scale in zip(images.shape[-2:], self.scale, strict=True)]
            own = functional.interpolate(own, sides, mode="bilinear", antialias=True)
        logits: Tensor = self.network(own).float()
        if logits.ndim == 4 and logits.shape[-2:] != images.shape[-2:]:
            logits = functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    def _side(self, side: int, scale: float) -> int:
        return max(1, round(side * scale / self.multiple)) * self.multiple


class Ensemble(nn.Module):
    """Members whose probabilities are averaged."""

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float]) -> None:
        """Bind members; the weights add up to 1."""
        super().__init__()
        self.members, self.weights = nn.ModuleList(members), tuple(weights)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the mean probability of images [B, C, H, W].

        Returns: float32 [B, K] or [B, K, H, W]; with one channel, that of the second of two classes.
        """
        logits = [member(images) for member in self.members]
        if logits[0].ndim == 4 and logits[0].shape[1] == 1:
            here, not_here = (
                self._mean([torch.sigmoid(sign * one) for one in logits]).clamp_min(LEAST).log() for sign in (1, -1)
            )
            return here - not_here
        return self._mean([torch.softmax(one, 1) for one in logits]).clamp_min(LEAST).log()

    def _mean(self, values: list[Tensor]) -> Tensor:
        return torch.stack([weight * one for weight, one in zip(self.weights, values, strict=True)]).sum(0)
