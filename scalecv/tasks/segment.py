"""One class per pixel. Class 0 is the background; two classes need one logit, that of the foreground."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scalecv.config import Loss
from scalecv.metrics import confusion as numbers
from scalecv.tasks.task import Batch, Task, active_terms, refuse, refuse_images
from scalecv.tasks.tell import each_class


def default_loss(classes: int) -> dict[str, float]:
    """Half per pixel, half per area."""
    return {"bce" if classes == 2 else "cross_entropy": 0.5, "dice": 0.5}


def outputs(classes: int, channels: int = 0) -> int:
    """One logit for two classes, else one per class."""
    return 1 if classes == 2 else classes


def check(loss: Loss, classes: int) -> None:
    """Raises: ConfigError: a term for two classes where there are more."""
    refuse_images(loss)
    if classes != 2:
        refuse(loss, "bce", f"is for two classes, the dataset has {classes}; use loss.cross_entropy")


def losses(logits: Tensor, batch: Batch, loss: Loss, class_weights: Tensor | None) -> dict[str, Tensor]:
    """The active terms, float32 [B] each."""
    names = list(loss.terms() or default_loss(_classes(logits)))
    return active_terms(logits, batch, batch["mask"], names, loss, class_weights)


def score(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Confusion int64 [K, K] of the labelled pixels and the number of valid rows."""
    matrix = numbers.confusion(_decide(logits.detach()), batch["mask"], _classes(logits), batch["valid"])
    return {"confusion": matrix, "rows": batch["valid"].sum()}


def summarise(sums: Mapping[str, Tensor], classes: Sequence[str]) -> dict[str, float]:
    """accuracy, macro_accuracy, f1, iou (both of the foreground for two classes, else means), and what they hide.

    trivial_iou and trivial_accuracy are those of a model that sees background everywhere; iou_NAME is given for up to
    20 classes, precision and recall of the foreground for two.
    """
    matrix = sums["confusion"].cpu()
    nothing = numbers.always(matrix, 0)
    each = numbers.per_class(matrix)
    foreground = {name: float(each[name][1]) for name in ("precision", "recall")} if len(classes) == 2 else {}
    return {
        "accuracy": numbers.accuracy(matrix),
        "macro_accuracy": numbers.macro_accuracy(matrix),
        "f1": float(each["f1"][1]) if len(classes) == 2 else numbers.macro_f1(matrix),
        "iou": numbers.mean_iou(matrix),
        "trivial_iou": numbers.mean_iou(nothing),
        "trivial_accuracy": numbers.accuracy(nothing),
        **foreground,
        **each_class("iou", each["iou"], classes),
    }


def predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class int64 [B, H, W] and probability float32 [B, K, H, W]."""
    scores = logits.float()
    if scores.shape[1] == 1:
        p = torch.sigmoid(scores)
        return _decide(scores), torch.cat([1 - p, p], 1)
    return _decide(scores), torch.softmax(scores, 1)


def _classes(logits: Tensor) -> int:
    return max(2, logits.shape[1])


def _decide(logits: Tensor) -> Tensor:
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


SEGMENT = Task(
    name="segment",
    headline="iou",
    target="mask",
    default_loss=default_loss,
    outputs=outputs,
    check=check,
    losses=losses,
    score=score,
    summarise=summarise,
    predict=predict,
)
