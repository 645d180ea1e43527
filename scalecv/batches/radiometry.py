"""Random changes of values, each band by itself: gain and offset, blur, noise, a band that is gone.

Strengths are in units of a band's own standard deviation over the training split, so that one number fits 8-bit
photographs and 16-bit reflectances. Chance comes from the sample's draws alone, as whole numbers: no release of a
library changes them. Pixels without data keep their value, and none of it gets into their neighbours.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from scalecv.config import Augment

LEAST_SIGMA_PX = 0.1
"""A blur below this changes nothing that can be seen."""
BYTE_SUM_STD = (8 * (256**2 - 1) / 12) ** 0.5
"""Standard deviation of the sum of eight random bytes."""


def change_bands(
    image: torch.Tensor,
    how: Augment,
    u: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    missing: torch.Tensor | None = None,
) -> torch.Tensor:
    """One random variant of the values of an image, in its dtype.

    Args:
        image: [C, H, W], uint8, int16 or float32, in the units of the files.
        how: strengths and probabilities.
        u: the draws of the sample, float64 [24]; places 19 to 22 belong to these operations.
        mean, std: of each band, in the units of the files.
        missing: bool [H, W], pixels that stay as they are; None where all have data.
    """
    if not how.changes_bands:
        return image
    device = image.device
    middle = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)
    changed = image.float()
    if how.band_gain or how.band_offset:
        ab = torch.from_numpy(_uniform(u, "bands", 2 * len(image)).reshape(2, -1, 1, 1) * 2 - 1).to(device)
        changed = (changed - middle) * (1 + how.band_gain * ab[0]) + middle + how.band_offset * ab[1] * spread
    if how.blur_px * u[20] >= LEAST_SIGMA_PX:
        changed = _blurred(changed, float(how.blur_px * u[20]), missing)
    if how.noise:
        changed = changed + _noise(u, tuple(image.shape)).to(device) * (spread * float(how.noise * u[19]))
    if u[21] < how.band_drop:
        band = int(u[22] * len(image))
        changed = torch.cat([changed[:band], middle[band].expand_as(changed[:1]), changed[band + 1 :]])
    whole = in_dtype(changed, image.dtype)
    return whole if missing is None else torch.where(missing, image, whole)


def in_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in a dtype: rounded, and cut off where it ends."""
    if dtype.is_floating_point:
        return values.to(dtype)
    limits = torch.iinfo(dtype)
    return values.round_().clamp_(limits.min, limits.max).to(dtype)


def _raw(u: np.ndarray, what: str, words: int) -> np.ndarray:
    """uint64 [words], random bits of the sample."""
    digest = hashlib.sha256(what.encode() + u.tobytes()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(words)


def _uniform(u: np.ndarray, what: str, count: int) -> np.ndarray:
    """float32 [count] in [0, 1)."""
    return ((_raw(u, what, count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).astype(np.float32)


def _noise(u: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 of a shape, mean 0, standard deviation 1: sums of eight random bytes, normal but for the far tails."""
    count = int(np.prod(shape))
    sums = _raw(u, "noise", count).view(np.uint8).reshape(count, 8).sum(-1, dtype=np.int32)
    return torch.from_numpy(((sums - 1020) / np.float32(BYTE_SUM_STD)).astype(np.float32)).view(shape)


def _blurred(image: torch.Tensor, sigma_px: float, missing: torch.Tensor | None) -> torch.Tensor:
    """Gaussian blur of [C, H, W]; pixels without data have no weight, edges repeat."""
    if missing is None:
        return _along(_along(image, sigma_px, -1), sigma_px, -2)
    weight = (~missing).float()[None]
    both = torch.cat([image * weight, weight])
    both = _along(_along(both, sigma_px, -1), sigma_px, -2)
    return both[:-1] / both[-1:].clamp_min(1e-6)


def _along(image: torch.Tensor, sigma_px: float, dim: int) -> torch.Tensor:
    """The blur along one dimension, as a sum of shifted images: the same bits with any number of threads."""
    radius = max(1, int(np.ceil(3 * sigma_px)))
    at = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (at / sigma_px) ** 2)
    weights = weights / weights.sum()
    size = image.shape[dim]
    out = torch.zeros_like(image)
    for shift, weight in zip(at.tolist(), weights.tolist(), strict=True):
        index = torch.arange(shift, shift + size, device=image.device).clamp_(0, size - 1)
        out.add_(image.index_select(dim, index), alpha=weight)
    return out
