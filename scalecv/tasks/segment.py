"""One class per pixel. Class 0 is the background; two classes need one logit, that of the foreground."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scalecv.config import Loss
from scalecv.metrics import binned
from scalecv.metrics import confusion as numbers
from scalecv.tasks.task import Batch, Task, active_terms, refuse_images, two_classes_alone
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
    two_classes_alone(loss, classes, ("bce", "pos_neg_iou"))


def losses(logits: Tensor, batch: Batch, loss: Loss, class_weights: Tensor | None) -> dict[str, Tensor]:
    """The active terms, float32 [B] each."""
    names = list(loss.terms() or default_loss(_classes(logits)))
    return active_terms(logits, batch, batch["mask"], names, loss, class_weights)


def score(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Confusion int64 [K, K] of the labelled pixels and the number of valid rows.

    Two classes: also probabilities int64 [2, BINS] of the labelled pixels, and empty int64 [BINS], the tiles without
    foreground by the highest probability in them (see metrics.binned).
    """
    target, valid, rows = batch["mask"], batch["valid"], batch["valid"].sum()
    if _classes(logits) > 2:
        return {
            "confusion": numbers.confusion(logits.detach().argmax(1), target, _classes(logits), valid),
            "rows": rows,
        }
    p = _foreground(logits.detach())
    probabilities = binned.counts(p, target, valid)
    return {
        "confusion": binned.confusion_at(probabilities, 0.5),
        "probabilities": probabilities,
        "empty": binned.highest_of_empty(p, target, valid),
        "rows": rows,
    }


def summarise(sums: Mapping[str, Tensor], classes: Sequence[str], threshold: float = 0.5) -> dict[str, float]:
    """The iou and f1 (of the foreground for two classes, else means), more of two classes, and accuracies last.

    trivial_iou and trivial_accuracy are those of a model that says background everywhere, and is_trivial is 1.0 for one
    that does so or has no better iou; iou_NAME is given for up to 20 classes. Two classes have also those of
    `_of_two`, and all but average_precision and calibration_error are at the threshold.
    """
    two = {name: sums[name].cpu() for name in ("probabilities", "empty", "rows") if name in sums}
    matrix = binned.confusion_at(two["probabilities"], threshold) if "probabilities" in two else sums["confusion"].cpu()
    each, iou = numbers.per_class(matrix), numbers.mean_iou(matrix)
    nothing = numbers.always(matrix, 0)
    is_background = not bool(matrix[:, 1:].any())
    return {
        "iou": iou,
        "f1": float(each["f1"][1]) if len(classes) == 2 else numbers.macro_f1(matrix),
        **({name: float(each[name][1]) for name in ("precision", "recall")} if len(classes) == 2 else {}),
        **(_of_two(two, matrix, threshold) if "probabilities" in two else {}),
        "trivial_iou": numbers.mean_iou(nothing),
        "is_trivial": float(is_background or iou <= numbers.mean_iou(nothing)),
        **each_class("iou", each["iou"], classes),
        "macro_accuracy": numbers.macro_accuracy(matrix),
        "accuracy": numbers.accuracy(matrix),
        "trivial_accuracy": numbers.accuracy(nothing),
    }


def _of_two(two: Mapping[str, Tensor], matrix: Tensor, threshold: float) -> dict[str, float]:
    """What is told where there are two classes; a tile is an image.

    average_precision over pixels; calibration_error of their probabilities; false_positives_per_tile, the background
    pixels called foreground, mean over all tiles; false_alarm_tiles, the share of the tiles without foreground in which
    any pixel is called foreground.
    """
    empty = two["empty"]
    alarms = empty[binned.place(threshold) :].sum()
    return {
        "average_precision": binned.average_precision(two["probabilities"]),
        "calibration_error": binned.calibration_error(two["probabilities"]),
        "false_positives_per_tile": float(matrix[0, 1]) / max(1, int(two["rows"])),
        "false_alarm_tiles": float(alarms) / max(1, int(empty.sum())),
    }


def predict(logits: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Class int64 [B, H, W] and probability float32 [B, K, H, W]; of two classes the second from the threshold on."""
    if _classes(logits) > 2:
        p = torch.softmax(logits.float(), 1)
        return logits.argmax(1), p
    p = _foreground(logits)
    return (p >= threshold).long(), torch.stack([1 - p, p], 1)


def rows(logits: Tensor, batch: Batch, threshold: float = 0.5) -> dict[str, Tensor]:
    """The confusion of the labelled pixels of each image, int64 [B, K, K]."""
    prediction, _ = predict(logits.detach(), threshold)
    return {"confusion": numbers.by_row(prediction, batch["mask"], _classes(logits))}


def _classes(logits: Tensor) -> int:
    return max(2, logits.shape[1])


def _foreground(logits: Tensor) -> Tensor:
    """Probability of the second class, float32 [B, H, W]."""
    scores = logits.float()
    return torch.sigmoid(scores[:, 0]) if scores.shape[1] == 1 else torch.softmax(scores, 1)[:, 1]


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
    rows=rows,
    tuned=True,
)
