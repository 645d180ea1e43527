"""Deterministic resizing and random augmentation of one sample, image and mask together.

torchvision is imported by what needs it alone: it takes seconds and 130 MB.

All chance is in `draws`: numbers from (seed, epoch, sample id) alone. The same sample looks the same
on any number of workers, in any thread, after any restart, whatever the version of a library.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from scalecv.batches.radiometry import change_bands, in_dtype
from scalecv.config import Augment
from scalecv.schema import IGNORE

DRAWS = 24
_ELEVEN = np.uint64(11)
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def draws(seed: int, epoch: int, row_id: str, again: int = 0) -> np.ndarray:
    """float64 [DRAWS] in [0, 1), from SHA-512 of (seed, epoch, id, how often the row was drawn before in the epoch)."""
    key = f"{seed}|{epoch}|{row_id}{f'|again {again}' if again else ''}".encode()
    sha512 = hashlib.sha512
    raw = sha512(key + b"|0").digest() + sha512(key + b"|1").digest() + sha512(key + b"|2").digest()
    return (np.frombuffer(raw, "<u8") >> _ELEVEN) * 2.0**-53


def resize(
    image: torch.Tensor, mask: torch.Tensor | None, size_px: int, how: str, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sample as a square; masks take the nearest pixel.

    Args:
        image: [C, H, W].
        mask: int64 [..., H, W] or None.
        size_px: side of the square.
        how: "stretch", or "crop" (centre of the shorter side's square).
        out: [C, size_px, size_px] of the image's dtype, where the result may be written.
    """
    height, width = image.shape[-2:]
    if how == "crop" and height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[:, top : top + side, left : left + side]
        mask = None if mask is None else mask[..., top : top + side, left : left + side]
    if image.shape[-2:] == (size_px, size_px):
        return image, mask
    return scaled(image, size_px, size_px, out), None if mask is None else _nearest(mask, size_px)


def scaled(image: torch.Tensor, height: int, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Bilinear with antialias; bytes by torch's kernel for bytes, straight into `out`, on every kind of CPU."""
    if image.dtype != torch.uint8:
        from torchvision.transforms.v2 import functional as F

        changed: torch.Tensor = F.resize(image, [height, width], antialias=True)
        return changed
    if out is None:
        out = torch.empty((height, width, len(image)), dtype=torch.uint8).permute(2, 0, 1)
    torch.ops.aten._upsample_bilinear2d_aa.out(image[None], [height, width], False, None, None, out=out[None])
    return out


def with_missing(mask: torch.Tensor | None, missing: torch.Tensor | None) -> torch.Tensor | None:
    """A mask, int64 [H, W], and where pixels are missing, bool [H, W], as planes that move together."""
    if missing is None:
        return mask
    planes = [missing.long()] if mask is None else [mask, missing.long()]
    return torch.stack(planes)


def without_missing(
    planes: torch.Tensor | None, *, has_mask: bool, has_missing: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask and where pixels are missing, of planes that were moved; what comes from outside is missing too."""
    if planes is None or not has_missing:
        return planes, None
    return planes[0] if has_mask else None, planes[-1] != 0


def move(
    image: torch.Tensor,
    mask: torch.Tensor | None,
    how: Augment,
    u: np.ndarray,
    size_px: int | None,
    box: Box | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One random variant of a sample's geometry.

    Args:
        image: [C, H, W], uint8, int16 or float32, not normalised.
        mask: int64 [..., H, W] or None; pixels that come from outside the image become IGNORE.
        how: strengths and probabilities.
        u: float64 [DRAWS] in [0, 1); each operation has places of its own, so switching one on or off
            does not change the others.
        size_px: side after a resized crop.
        box: what the resized crop takes, where it is known already.
        out: [C, size_px, size_px] of the image's dtype, where the result may be written.
    """
    if how.resized_crop and size_px:
        top, left, height, width = box or crop_box(image.shape[-2], image.shape[-1], how.resized_crop, u)
        image = scaled(image[:, top : top + height, left : left + width], size_px, size_px, out)
        mask = None if mask is None else _nearest(mask[..., top : top + height, left : left + width], size_px)
    flips = [axis for axis, draw, chance in ((-1, u[4], how.hflip), (-2, u[5], how.vflip)) if draw < chance]
    if flips:  # at once: each flip is a copy
        image, mask = image.flip(flips), None if mask is None else mask.flip(flips)
    if how.rot90:
        turns = int(u[6] * 4)
        image, mask = image.rot90(turns, (-2, -1)), None if mask is None else mask.rot90(turns, (-2, -1))
    if how.pad_crop_px:
        image, mask = _pad_crop(image, mask, how.pad_crop_px, u[7:9])
    if how.rotate_deg or how.translate or how.zoom:
        image, mask = _affine(image, mask, how, u[9:13])
    return image, mask


def recolour(
    image: torch.Tensor,
    how: Augment,
    u: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    missing: torch.Tensor | None = None,
) -> torch.Tensor:
    """One random variant of a sample's values.

    Args:
        image: [C, H, W], uint8, int16 or float32, not normalised.
        how: strengths and probabilities.
        u: float64 [DRAWS] in [0, 1).
        mean, std: of each band, in the units of the files.
        missing: bool [H, W], pixels without data.
    """
    if how.brightness or how.contrast:
        changed = _photometric(image, 1 + how.brightness * (2 * u[13] - 1), 1 + how.contrast * (2 * u[14] - 1))
        image = changed if missing is None else torch.where(missing, image, changed)
    image = change_bands(image, how, u, mean, std, missing)
    return _erase(image, u[16:19]) if u[15] < how.erase else image


def crop_box(height: int, width: int, share: tuple[float, float], u: np.ndarray) -> Box:
    """A box of a random share of the area and a ratio of 3:4 to 4:3, cut down to the image where it does not fit."""
    scale, shape, down, right = u[:4].tolist()  # plain numbers: a third of the time
    area = height * width * (share[0] + (share[1] - share[0]) * scale)
    ratio = float(np.exp(_NARROW + _WIDER * shape))
    w = min(width, max(1, round((area * ratio) ** 0.5)))
    h = min(height, max(1, round((area / ratio) ** 0.5)))
    return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w


_NARROW = float(np.log(3 / 4))
_WIDER = float(np.log(4 / 3) - np.log(3 / 4))
"""Logarithm of the narrowest ratio of a crop, and from there to that of the widest."""


def _pad_crop(
    image: torch.Tensor, mask: torch.Tensor | None, pad: int, u: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor | None]:
    height, width = image.shape[-2:]
    rows = _reflected(height, int(u[0] * (2 * pad + 1)) - pad)
    columns = _reflected(width, int(u[1] * (2 * pad + 1)) - pad)
    return image[:, rows][:, :, columns], None if mask is None else mask[..., rows, :][..., columns]


def _reflected(size: int, shift: int) -> torch.Tensor:
    """Indices 0..size-1 moved by `shift` and mirrored at the edges."""
    at = (np.arange(size) + shift) % (2 * size)
    return torch.from_numpy(np.where(at < size, at, 2 * size - 1 - at))


def _affine(
    image: torch.Tensor, mask: torch.Tensor | None, how: Augment, u: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    height, width = image.shape[-2:]
    angle = float(how.rotate_deg * (2 * u[0] - 1))
    shift = [float(how.translate * (2 * u[1] - 1) * width), float(how.translate * (2 * u[2] - 1) * height)]
    scale = float(1 + how.zoom * (2 * u[3] - 1))
    changed = image if image.dtype == torch.uint8 else image.float()
    fill = changed.float().mean((-2, -1)).tolist()
    changed = F.affine(changed, angle, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR, fill=fill).to(image.dtype)
    if mask is None:
        return changed, None
    planes = mask.reshape(-1, height, width).float()
    fill = [float(IGNORE)] * len(planes)
    moved = F.affine(planes, angle, shift, scale, [0.0, 0.0], InterpolationMode.NEAREST, fill=fill)
    return changed, moved.long().reshape(mask.shape)


def _photometric(image: torch.Tensor, brightness: float, contrast: float) -> torch.Tensor:
    """Any number of bands: scale all, then stretch around each band's mean."""
    changed = image.float() * brightness
    mean = changed.mean((-2, -1), keepdim=True)
    changed = (changed - mean) * contrast + mean
    return in_dtype(changed, image.dtype)


def _erase(image: torch.Tensor, u: np.ndarray) -> torch.Tensor:
    """Blank a rectangle of 2 to 20 % of the area with the band's mean."""
    height, width = image.shape[-2:]
    side = (0.02 + 0.18 * u[0]) ** 0.5
    h, w = max(1, int(height * side)), max(1, int(width * side))
    top, left = int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1))
    changed = image.clone()
    changed[:, top : top + h, left : left + w] = image.float().mean((-2, -1), keepdim=True).to(image.dtype)
    return changed


def _nearest(mask: torch.Tensor, size_px: int) -> torch.Tensor:
    height, width = mask.shape[-2:]
    middle = 2 * torch.arange(size_px) + 1  # of the new pixel, in half pixels
    return mask[..., middle * height // (2 * size_px), :][..., middle * width // (2 * size_px)]
