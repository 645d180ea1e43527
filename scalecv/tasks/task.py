"""A task: what the training loop asks of a kind of problem, as a record of functions.

B images, C channels, K classes, H x W pixels. A batch on the device is a mapping: "image" float [B, C, H, W]
normalised, "label" int64 [B] or "mask" int64 [B, H, W] (IGNORE where not labelled), "valid" bool [B] (False: a row
that only fills the batch and counts nowhere), "id" list of str, "position" int64 [B].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalecv.config import Loss
from scalecv.errors import ConfigError
from scalecv.models import losses as terms

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One kind of problem."""

    name: str
    """As the experiment names it."""
    headline: str
    """Metric that decides what is best, unless train.metric says otherwise; larger is better."""
    target: str
    """Key of the batch that holds the truth."""
    default_loss: Callable[[int], dict[str, float]]
    """Terms and weights for K classes where the experiment names none."""
    outputs: Callable[[int], int]
    """Channels of the logits for K classes."""
    check: Callable[[Loss, int], None]
    """Raises ConfigError for terms that do not fit K classes."""
    losses: Callable[[Tensor, Batch, Loss, Tensor | None], dict[str, Tensor]]
    """(logits, batch, loss, class weights) -> each active term, float32 [B], 0 where not valid."""
    score: Callable[[Tensor, Batch], dict[str, Tensor]]
    """(logits, batch) -> sums that add up: confusion int64 [K, K], rows int64."""
    summarise: Callable[[Mapping[str, Tensor], Sequence[str]], dict[str, float]]
    """(sums, class names) -> metrics by name, without the split."""
    predict: Callable[[Tensor], tuple[Tensor, Tensor]]
    """logits -> class int64 [B] or [B, H, W], probability float32 [B, K] or [B, K, H, W]."""


def active_terms(
    logits: Tensor, batch: Batch, target: Tensor, names: Sequence[str], loss: Loss, class_weights: Tensor | None
) -> dict[str, Tensor]:
    """The named terms of the loss, float32 [B] each; rows that are not valid give 0."""
    compute: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: terms.cross_entropy(logits, target, class_weights, loss.label_smoothing),
        "bce": lambda: terms.bce(logits, target, loss.pos_weight),
        "dice": lambda: terms.dice(logits, target),
        "jaccard": lambda: terms.jaccard(logits, target),
        "focal": lambda: terms.focal(logits, target, loss.focal_gamma),
    }
    return {name: torch.where(batch["valid"], compute[name](), 0.0) for name in names}


def refuse(loss: Loss, term: str, why: str) -> None:
    """Raises: ConfigError: the loss has a term that does not fit."""
    if term in loss.terms():
        raise ConfigError(f"loss.{term}={getattr(loss, term)} {why}")
