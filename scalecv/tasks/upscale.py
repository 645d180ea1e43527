"""A larger image of the same place: super-resolution.

The tile is the truth; what the network sees is the tile made smaller by its factor. Masks and labels of a dataset are
not looked at; a batch's masks say where a tile has data, and pixels without count nowhere (see Pixels.marks_data).
Beside the network's scores stand those of bicubic enlargement of the same input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scalecv.config import IMAGE_TERMS, Loss
from scalecv.metrics import fidelity
from scalecv.models.upscalers import bicubic, reduced
from scalecv.schema import IGNORE
from scalecv.tasks.task import Batch, Task, active_terms, refuse

if TYPE_CHECKING:
    from scalecv.batches.pixels import Pixels
    from scalecv.tasks.pictures import Sample


@dataclass(frozen=True)
class Units:
    """How normalised values become those of the files, one number for each band."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    span: tuple[float, ...]
    """Range of the values over the training split; 0 where there is none."""


def upscaling(factor: int, pixels: "Pixels") -> Task:
    """The task for one factor and one kind of image."""
    units = Units(pixels.mean, pixels.std, pixels.span or tuple(6 * std for std in pixels.std))
    return replace(
        UPSCALE,
        prepare=partial(prepare, factor),
        score=partial(score, units),
        rows=partial(rows, units),
        draw=partial(draw, factor, units),
    )


def default_loss(classes: int) -> dict[str, float]:
    """The mean absolute difference."""
    return {"l1": 1.0}


def outputs(classes: int, channels: int) -> int:
    """As many bands as come in."""
    return channels


def check(loss: Loss, classes: int) -> None:
    """Raises: ConfigError: a term that does not compare images."""
    for term in set(loss.terms()) - set(IMAGE_TERMS):
        refuse(loss, term, f"is not for task=upscale; use {', '.join(f'loss.{name}' for name in IMAGE_TERMS)}")


def prepare(factor: int, batch: Batch) -> dict[str, Any]:
    """The tile as "truth", NaN where it has no data, and the smaller one that the network sees as "image"."""
    tile = batch["image"]
    truth = tile.masked_fill((batch["mask"] == IGNORE)[:, None], torch.nan) if "mask" in batch else tile
    return {**batch, "truth": truth, "image": reduced(tile, factor)}


def losses(logits: Tensor, batch: Batch, loss: Loss, class_weights: Tensor | None) -> dict[str, Tensor]:
    """The active terms, float32 [B] each, on normalised values: all bands weigh the same."""
    return active_terms(logits, batch, batch["truth"], list(loss.terms() or default_loss(0)), loss, class_weights)


def score(units: Units | None, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Sums over images of PSNR and SSIM, of the network and of bicubic, float64, and of how many images.

    An image without data has neither, one whose data fills no window of SSIM has no SSIM.
    """
    truth, valid = batch["truth"], batch["valid"]
    rivals = {"": logits.detach(), "bicubic_": bicubic(batch["image"], truth.shape[-1] // batch["image"].shape[-1])}
    places = {"psnr": fidelity.has_data_of(truth), "ssim": fidelity.whole_windows(truth)}
    counted = {measure: where.flatten(1).any(1) & valid for measure, where in places.items()}
    sums: dict[str, Tensor] = {"rows": valid.sum()} | {f"{name}_rows": rows.sum() for name, rows in counted.items()}
    units = units or _plain(truth)
    known = _as_files(truth, units)
    for name, images in rivals.items():
        shown = _as_files(images, units)
        for measure, of in (("psnr", fidelity.psnr), ("ssim", fidelity.ssim)):
            sums[name + measure] = torch.where(counted[measure], of(shown, known, units.span), 0.0).sum()
    return sums


def summarise(sums: Mapping[str, Tensor], classes: Sequence[str], threshold: float = 0.5) -> dict[str, float]:
    """Psnr (dB) and ssim, means over images with data, and bicubic_psnr and bicubic_ssim of the same input."""
    names = ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim")
    return {name: float(sums[name]) / max(1, int(sums[f"{name[-4:]}_rows"])) for name in names}


def predict(logits: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """The image, float32 [B, C, H, W], normalised; there is no probability beside it."""
    return logits.float(), logits.float()


def rows(units: Units | None, logits: Tensor, batch: Batch, threshold: float = 0.5) -> dict[str, Tensor]:
    """Psnr and ssim of each image, float64 [B], NaN where it has none, and its pixels with data, int64 [B]."""
    truth, units = batch["truth"], units or _plain(batch["truth"])
    shown, known = _as_files(logits.detach(), units), _as_files(truth, units)
    pixels = fidelity.has_data_of(truth).flatten(1).sum(1)
    has_window = fidelity.whole_windows(truth).flatten(1).any(1)
    return {
        "psnr": torch.where(pixels > 0, fidelity.psnr(shown, known, units.span), torch.nan),
        "ssim": torch.where(has_window, fidelity.ssim(shown, known, units.span), torch.nan),
        "pixels": pixels,
    }


def draw(factor: int, units: Units, samples: Sequence["Sample"], classes: Sequence[str], title: str) -> bytes:
    """PNG of input, bicubic, network and truth of each sample, all with the contrast of the truth."""
    from scalecv.tasks.pictures import images_png

    rows, notes = [], []
    for sample in samples:
        truth, found = torch.from_numpy(sample.truth)[None], torch.from_numpy(sample.prediction)[None]
        small = reduced(truth.nan_to_num(), factor)  # without data the network sees the mean
        large = bicubic(small, factor)
        rows.append([one[0].numpy() for one in (small, large, found, truth)])
        known = _as_files(truth, units)
        gains = [float(fidelity.psnr(_as_files(one, units), known, units.span)) for one in (large, found)]
        notes.append(f"bicubic {gains[0]:.2f} dB, network {gains[1]:.2f} dB")
    return images_png([_alike(row) for row in rows], ("input", "bicubic", "network", "truth"), notes, title)


def _alike(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[C, h, w] each as uint8 [h, w, 3], stretched alike: 2 % of the last one's values are black, 2 % white."""
    take = [0, 1, 2] if len(images[-1]) >= 3 else [0, 0, 0]
    has_data = np.isfinite(images[-1]).all(0)
    values = images[-1][take][:, has_data] if has_data.any() else np.zeros((3, 1))
    black, white = np.percentile(values, [2, 98], axis=1)
    scale = 255 / np.maximum(white - black, 1e-12)
    shown = [np.nan_to_num((one[take].transpose(1, 2, 0) - black) * scale) for one in images]
    return [one.clip(0, 255).round().astype(np.uint8) for one in shown]


def _plain(truth: Tensor) -> Units:
    """For values that are in the units of the files already, of a range of 1."""
    bands = truth.shape[1]
    return Units((0.0,) * bands, (1.0,) * bands, (1.0,) * bands)


def _as_files(values: Tensor, units: Units) -> Tensor:
    """Normalised values in the units of the files, float64."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64, device=values.device).view(1, -1, 1, 1) for v in (units.mean, units.std)
    )
    return values.double() * std + mean


UPSCALE = Task(
    name="upscale",
    headline="psnr",
    target="truth",
    default_loss=default_loss,
    outputs=outputs,
    check=check,
    losses=losses,
    score=partial(score, None),
    summarise=summarise,
    predict=predict,
    rows=partial(rows, None),
    tuned=False,
    prepare=partial(prepare, 2),
)
"""For images enlarged twice, in units of their own deviations; `upscaling` gives the one of an experiment."""
