"""How near one image is to another: PSNR and SSIM, one number for each image, so that sums add up.

B images, C bands, H x W pixels. The range of a band is the span of its values over the training split; a band without
a span (an opaque alpha) counts nowhere, nor does a pixel that is NaN in the truth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

WINDOW_PX, SIGMA_PX = 11, 1.5
K1, K2 = 0.01, 0.03
LEAST_ERROR = 1e-10
"""Mean squared error, as a share of the squared range, below which two images are equal: 100 dB."""


def psnr(images: Tensor, truth: Tensor, span: Sequence[float]) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [B]; 100 for equal images, and where there is nothing to compare.

    Args:
        images, truth: float [B, C, H, W], in the same units.
        span: range of each band in these units. The error is averaged over bands as shares of their ranges.
    """
    bands, ranges = _counted(span, truth)
    if not bands:
        return torch.full((len(truth),), 100.0, dtype=torch.float64, device=truth.device)
    has_data = has_data_of(truth)
    apart = (images[:, bands].double() - truth[:, bands].double()) / ranges
    error = torch.where(has_data[:, None], apart, 0.0).square().mean(1).flatten(1).sum(1)
    return -10 * (error / has_data.flatten(1).sum(1).clamp_min(1)).clamp_min(LEAST_ERROR).log10()


def ssim(images: Tensor, truth: Tensor, span: Sequence[float]) -> Tensor:
    """Structural similarity (Wang et al. 2004), float64 [B]: mean over bands and places of the window.

    A Gaussian window of 11 x 11 px with a deviation of 1.5 px, K1 = 0.01, K2 = 0.03, variances of the window as a
    population, only where the window lies in the image and every pixel in it has data (see `whole_windows`). A smaller
    image gets a window of its own (odd) side.

    Args:
        images, truth: float [B, C, H, W] in the units of the files, not centred: the measure looks at brightness too.
        span: range of each band in these units.
    """
    bands, ranges = _counted(span, truth)
    if not bands:
        return torch.ones(len(truth), dtype=torch.float64, device=truth.device)
    has_data, whole = has_data_of(truth)[:, None], whole_windows(truth)
    a, b = (torch.where(has_data, values[:, bands].double(), 0.0) / ranges for values in (images, truth))
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    both = _blurred(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    above = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    each = torch.where(whole, (above / below).mean(1), 0.0)
    return each.flatten(1).sum(1) / whole.flatten(1).sum(1).clamp_min(1)


def has_data_of(truth: Tensor) -> Tensor:
    """Where no band [B, C, H, W] is NaN, bool [B, H, W]."""
    return ~truth.isnan().any(1)


def whole_windows(truth: Tensor) -> Tensor:
    """Where the window of `ssim` lies in the image and every pixel in it has data, bool [B, H', W']."""
    gone = (~has_data_of(truth)).float()
    return functional.max_pool2d(gone, _side(truth), stride=1) == 0


def _counted(span: Sequence[float], like: Tensor) -> tuple[list[int], Tensor]:
    """The bands that have a range, and their ranges, float64 [1, C', 1, 1]."""
    bands = [place for place, size in enumerate(span) if size > 0]
    ranges = torch.tensor([span[place] for place in bands], dtype=torch.float64, device=like.device)
    return bands, ranges.view(1, -1, 1, 1)


def _blurred(values: Tensor) -> Tensor:
    """The Gaussian mean around each place where the window fits, [B, C, H', W']."""
    channels, side = values.shape[1], _side(values)
    places = torch.arange(side, dtype=values.dtype, device=values.device) - side // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA_PX**2))
    weights = (weights / weights.sum()).expand(channels, 1, 1, side)
    across = functional.conv2d(values, weights, groups=channels)
    return functional.conv2d(across, weights.transpose(2, 3), groups=channels)


def _side(images: Tensor) -> int:
    """Of the window, odd."""
    side: int = min(WINDOW_PX, *images.shape[-2:])
    return side - 1 + side % 2
