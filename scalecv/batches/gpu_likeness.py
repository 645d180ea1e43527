"""Whether what the GPU makes of pictures is what the CPU makes of them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from scalecv.batches import transforms
from scalecv.batches.collate import Row, fill
from scalecv.batches.pixels import Pixels
from scalecv.errors import ConfigError
from scalecv.jpeg import turbo

MOST_OFF = 10.0
"""Levels of 255 that a crop may be off on average, both from what training sees on a CPU and from what libjpeg-turbo
gives where it enlarges colours by the nearest pixel, as nvJPEG does: in photographs the two are some levels apart, in
drawings of hard colours tens. Colours in another order, or another picture, are off by tens from both."""


class Job(NamedTuple):
    """A picture that the GPU makes."""

    row: Row
    header: turbo.Header
    box: transforms.Box
    flips: int
    chances: np.ndarray | None


def likeness(there: torch.Tensor, jobs: Sequence[Job], how: Pixels, seeds: tuple[int, int] | None) -> str:
    """A line on how far crops by the GPU are off.

    Args:
        there: float32 [N, 3, size_px, size_px], what the GPU has made.
        jobs: of what.
        how: crops and flips, and no further changes.
        seeds: as for `collate.fill`.
    Raises: ConfigError: they show something else.
    """
    rows = [job.row for job in jobs]
    with ThreadPoolExecutor(1) as pool:
        off = (there - fill(rows, how, seeds, pool, 1).wait()[0]["image"].float()).abs()
    means = off.mean((1, 2, 3)).tolist()
    for mean, made, job in zip(means, there, jobs, strict=True):
        if mean > MOST_OFF and float((made - _nearest(job, how)).abs().mean()) > MOST_OFF:
            raise ConfigError(
                f"data.decode=gpu: {job.row.where}, {job.row.path}: the GPU's pixels are off those of the CPU by "
                f"{mean:.1f} of 255 on average, at most {MOST_OFF:g} is taken for the same picture: set "
                "data.decode=trainer, and try another driver or release of TorchCodec"
            )
    return (
        f"data.decode=gpu: the GPU decodes JPEGs; {len(jobs)} crops are off those of the CPU by "
        f"{sum(means) / len(means):.2f} of 255 on average, {float(off.max()):.0f} at most"
    )


def _nearest(job: Job, how: Pixels) -> torch.Tensor:
    """A crop by libjpeg-turbo, float32 [3, H, W], whose colours are enlarged by the nearest pixel."""
    pixels = turbo.decode(job.row.image, job.header, is_exact=False)
    if pixels is None:
        return torch.full((3, 1, 1), torch.inf)
    (top, left, height, width), side = job.box, how.size_px or 0
    part = torch.from_numpy(pixels).permute(2, 0, 1)[:, top : top + height, left : left + width]
    dims = [dim for dim, bit in ((-1, 1), (-2, 2)) if job.flips & bit]
    return transforms.scaled(part, side, side).flip(dims).float()
