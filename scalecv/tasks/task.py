"""A task: what the training loop asks of a kind of problem, as a record of functions.

B images, C channels, K classes, H x W pixels. A batch on the device is a mapping: "image" float [B, C, H, W]
normalised, "label" int64 [B], "mask" int64 [B, H, W] (IGNORE where not labelled) or "truth" float [B, C, H, W] (NaN in
pixels without data), "valid" bool [B] (False: a row that only fills the batch and counts nowhere), "id" list of str,
"position" int64 [B].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scalecv.config import IMAGE_TERMS, Loss
from scalecv.errors import ConfigError
from scalecv.models import losses as terms
from scalecv.tasks.pictures import Sample

Batch = Mapping[str, Any]


COSTS = ("calibration_error", "false_positives_per_tile", "false_alarm_tiles", "is_trivial")
"""Metrics besides losses of which less is better."""


def is_cost(metric: str) -> bool:
    """Whether less of a metric, such as val/loss, is better."""
    return metric.endswith("loss") or metric.rpartition("/")[2] in COSTS


def as_it_is(batch: Batch) -> dict[str, Any]:
    """What most tasks do to a batch before the network sees it."""
    return dict(batch)


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
    outputs: Callable[..., int]
    """Channels of the logits for (K classes, channels of the images)."""
    check: Callable[[Loss, int], None]
    """Raises ConfigError for terms that do not fit K classes."""
    losses: Callable[[Tensor, Batch, Loss, Tensor | None], dict[str, Tensor]]
    """(logits, batch, loss, class weights) -> each active term, float32 [B], 0 where not valid."""
    score: Callable[[Tensor, Batch], dict[str, Tensor]]
    """(logits, batch) -> sums that add up: rows int64, and of classes confusion int64 [K, K] (at 0.5); for two classes
    also probabilities int64 [2, BINS] (see metrics.binned)."""
    summarise: "Summarise"
    """(sums, class names, threshold) -> metrics by name, without the split; the headline first."""
    predict: "Predict"
    """(logits, threshold) -> class int64 [B] or [B, H, W], probability float32 [B, K] or [B, K, H, W];
    or the image, twice."""
    rows: "Rows"
    """(logits, batch, threshold) -> what each row adds to the metrics, by name: label, prediction and probability (of
    the label), [B]; confusion int64 [B, K, K]; or psnr, ssim (NaN where there is none) and pixels, [B]."""
    tuned: bool
    """Whether two classes get a tuned threshold where train.threshold is empty; else they are told apart at 0.5."""
    prepare: Callable[[Batch], dict[str, Any]] = as_it_is
    """A batch on the device -> the batch whose "image" the network sees and whose `target` is its truth."""
    draw: Callable[[Sequence[Sample], Sequence[str], str], bytes] | None = None
    """(samples, class names, title) -> PNG of what was predicted; None leaves it to `pictures.predictions_png`."""


class Summarise(Protocol):
    """Metrics of sums."""

    def __call__(self, sums: Mapping[str, Tensor], classes: Sequence[str], threshold: float = 0.5) -> dict[str, float]:
        """Two classes are told apart at the threshold, more by the largest logit."""
        ...


class Predict(Protocol):
    """Classes and probabilities of logits."""

    def __call__(self, logits: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """Two classes are told apart at the threshold, more by the largest logit."""
        ...


class Rows(Protocol):
    """What each row adds to the metrics."""

    def __call__(self, logits: Tensor, batch: Batch, threshold: float = 0.5) -> dict[str, Tensor]:
        """Two classes are told apart at the threshold; rows that are not valid give anything."""
        ...


def active_terms(
    logits: Tensor, batch: Batch, target: Tensor, names: Sequence[str], loss: Loss, class_weights: Tensor | None
) -> dict[str, Tensor]:
    """The named terms of the loss, float32 [B] each; rows that are not valid give 0."""
    compute: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: terms.cross_entropy(logits, target, class_weights, loss.label_smoothing),
        "bce": lambda: terms.bce(logits, target, loss.pos_weight, loss.neg_weight),
        "dice": lambda: terms.dice(logits, target, loss.smooth),
        "jaccard": lambda: terms.jaccard(logits, target, loss.smooth),
        "tversky": lambda: terms.tversky(logits, target, loss.tversky_alpha, loss.tversky_beta, loss.smooth),
        "lovasz": lambda: terms.lovasz(logits, target),
        "pos_neg_iou": lambda: terms.pos_neg_iou(logits, target, loss.pos_iou, loss.neg_iou, loss.smooth),
        "focal": lambda: terms.focal(logits, target, loss.focal_gamma, loss.focal_alpha),
        "l1": lambda: terms.l1(logits, target),
        "charbonnier": lambda: terms.charbonnier(logits, target),
        "mse": lambda: terms.mse(logits, target),
    }
    return {name: torch.where(batch["valid"], compute[name](), 0.0) for name in names}


def refuse(loss: Loss, term: str, why: str) -> None:
    """Raises: ConfigError: the loss has a term that does not fit."""
    if term in loss.terms():
        raise ConfigError(f"loss.{term}={getattr(loss, term)} {why}")


def two_classes_alone(loss: Loss, classes: int, names: Sequence[str]) -> None:
    """Raises: ConfigError: a term, or a weight of positives, for two classes where there are more."""
    if classes == 2:
        return
    for term in names:
        refuse(loss, term, f"is for two classes, the dataset has {classes}; use loss.cross_entropy")
    if loss.focal_alpha is not None:
        raise ConfigError(f"loss.focal_alpha={loss.focal_alpha} is for two classes, the dataset has {classes}")


def refuse_images(loss: Loss) -> None:
    """Raises: ConfigError: the loss has a term that compares images."""
    for term in IMAGE_TERMS:
        refuse(loss, term, "compares images, so it is for task=upscale; leave it out")
