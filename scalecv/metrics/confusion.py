"""The confusion matrix, and every number that follows from it.

A matrix is int64 [K, K]: truth in rows, prediction in columns. Matrices add up over batches and ranks, so a
number computed from the sum is exact. What is 0/0 is 0.
"""

import torch
from torch import Tensor

from scalecv.schema import IGNORE


def confusion(prediction: Tensor, target: Tensor, classes: int, valid: Tensor | None = None) -> Tensor:
    """int64 [K, K] counts of (truth, prediction), on the device of the input.

    Args:
        prediction: int64 [B] or [B, H, W], values 0..K-1.
        target: same shape, values 0..K-1, or IGNORE where not labelled.
        classes: K.
        valid: bool [B]; rows with False count nowhere.
    Raises: ValueError: shapes differ, or a target outside 0..K-1 that is not IGNORE.
    """
    return joint(prediction, target, classes, classes, valid)


def by_row(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """The matrix of each row, int64 [B, K, K], of [B, H, W]; arguments and errors as those of `confusion`."""
    first = classes * torch.arange(len(target), device=target.device).view(-1, 1, 1)
    place = torch.where(target == IGNORE, IGNORE, target + first)
    return joint(prediction, place, len(target) * classes, classes).view(-1, classes, classes)


def joint(found: Tensor, target: Tensor, classes: int, values: int, valid: Tensor | None = None) -> Tensor:
    """int64 [classes, values] counts of (truth, what was found); arguments and errors as those of `confusion`."""
    if found.shape != target.shape:
        raise ValueError(f"prediction {tuple(found.shape)} and target {tuple(target.shape)} differ in shape")
    counted = target != IGNORE
    if valid is not None:
        counted = counted & valid.view(-1, *[1] * (target.ndim - 1))
    # Place 0 takes what does not count: no boolean indexing, which would wait for a GPU.
    place = torch.where(counted, target * values + found + 1, 0)
    counts = torch.bincount(place.flatten(), minlength=classes * values + 1)
    if counts.numel() != classes * values + 1:
        raise ValueError(f"a target lies outside 0..{classes - 1} and is not {IGNORE}, the mark of unlabelled pixels")
    return counts[1:].view(classes, values)


def accuracy(matrix: Tensor) -> float:
    """Share of the rows (or pixels) predicted right."""
    m = matrix.double()
    return float(_ratio(m.diagonal().sum(), m.sum()))


def per_class(matrix: Tensor) -> dict[str, Tensor]:
    """precision, recall, f1, iou and support of each class, float64 [K] on the CPU."""
    m = matrix.detach().cpu().double()
    hit, true, predicted = m.diagonal(), m.sum(1), m.sum(0)
    return {
        "precision": _ratio(hit, predicted),
        "recall": _ratio(hit, true),
        "f1": _ratio(2 * hit, true + predicted),
        "iou": _ratio(hit, true + predicted - hit),
        "support": true,
    }


def macro_accuracy(matrix: Tensor) -> float:
    """Mean recall over the classes that have rows (balanced accuracy)."""
    numbers = per_class(matrix)
    return _mean(numbers["recall"], numbers["support"] > 0)


def macro_f1(matrix: Tensor) -> float:
    """Mean F1 over the classes that have rows or predictions."""
    return _mean(per_class(matrix)["f1"], _seen(matrix))


def mean_iou(matrix: Tensor) -> float:
    """Intersection over union: of the second class (foreground) for two, else the mean over the classes seen."""
    each = per_class(matrix)["iou"]
    return float(each[1]) if len(each) == 2 else _mean(each, _seen(matrix))


def always(matrix: Tensor, place: int) -> Tensor:
    """The matrix of a model that always says class `place`."""
    out = torch.zeros_like(matrix)
    out[:, place] = matrix.sum(1)
    return out


def _seen(matrix: Tensor) -> Tensor:
    m = matrix.detach().cpu()
    return (m.sum(1) + m.sum(0)) > 0


def _mean(each: Tensor, counted: Tensor) -> float:
    return float(each[counted].mean()) if bool(counted.any()) else 0.0


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(1e-300), 0.0)
