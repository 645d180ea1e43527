"""Probabilities of two classes counted in fixed bins, and every number that follows from the counts at any threshold.

Counts are int64 [2, BINS]: truth in rows (negative, positive). They add up over batches and ranks in 76 kB, however
many pixels there are. EDGES are multiples of 1/4096, and towards 0 and 1, where a sure network has most of its pixels,
16 in each halving of what is left. A threshold is an edge, and a pixel (or row) is positive where its probability is
at least the threshold: edges are exact in float32, so the confusion matrix at a threshold is that of the predictions,
not an estimate. What ranks within a bin, such as average precision, takes a bin as one tie. What is 0/0 is 0.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scalecv.metrics.confusion import joint
from scalecv.schema import IGNORE

GROUPS = 16
"""Bars of the reliability diagram, each of an equal part of 0..1."""
_STEPS, _HALVINGS, _FLOAT32 = 4096, 40, 2**24


def _edges() -> Tensor:
    """Lower edges of the bins, float64, ascending from 0; all exact in float32, and no larger number below 1 is."""
    low = [2.0**-halving * (1 + step / 16) for halving in range(9, _HALVINGS) for step in range(16)]
    high = [1 - edge for edge in low if (edge * _FLOAT32).is_integer()]
    even = [step / _STEPS for step in range(_STEPS)]
    return torch.tensor(sorted({*low, *high, *even}), dtype=torch.float64)


EDGES = _edges()
BINS = len(EDGES)


@lru_cache(maxsize=8)
def _edges_on(device: torch.device) -> Tensor:
    return EDGES.float().to(device)


def bins(p: Tensor) -> Tensor:
    """The bin of each probability, int64; what is not a number lies in bin 0."""
    return (torch.bucketize(torch.nan_to_num(p.float()), _edges_on(p.device), right=True) - 1).clamp(0)


def counts(p: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """int64 [2, BINS] on the device of the input.

    Args:
        p: float32 [B] or [B, H, W], probability of the second class.
        target: int64, same shape; 0, 1, or IGNORE where not labelled.
        valid: bool [B]; rows with False count nowhere.
    Raises: ValueError: another target.
    """
    return joint(bins(p), target, 2, BINS, valid)


def highest_of_empty(p: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Tiles without a positive pixel by the bin of their highest probability, int64 [BINS]; p and target [B, H, W]."""
    labelled = target != IGNORE
    top = torch.where(labelled, bins(p), -1).flatten(1).amax(1)
    is_empty = valid & ~(target == 1).flatten(1).any(1)
    return torch.bincount(torch.where(is_empty, top + 1, 0), minlength=BINS + 1)[1:]


def place(threshold: float) -> int:
    """The bin that begins nearest to a threshold, but for the one that begins at 0."""
    return 1 + int((EDGES[1:] - threshold).abs().argmin())


def on_grid(threshold: float) -> float:
    """The nearest edge of a bin between 0 and 1, both left out."""
    return float(EDGES[place(threshold)])


def confusion_at(binned: Tensor, threshold: float) -> Tensor:
    """int64 [2, 2], truth in rows, of calling positive what has at least this probability."""
    at = place(threshold)
    return torch.stack([binned[:, :at].sum(1), binned[:, at:].sum(1)], 1)


@dataclass(frozen=True)
class Curve:
    """Numbers at every threshold, float64 [BINS] each, on the CPU."""

    threshold: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor
    iou: Tensor
    accuracy: Tensor


def curve(binned: Tensor) -> Curve:
    """Precision, recall, F1, IoU and accuracy at each edge from 0 on."""
    above = binned.cpu().double().flip(1).cumsum(1).flip(1)
    false, hit = above[0], above[1]
    negatives, positives = above[0, 0], above[1, 0]
    return Curve(
        threshold=EDGES,
        precision=_ratio(hit, hit + false),
        recall=_ratio(hit, positives.expand(BINS)),
        f1=_ratio(2 * hit, hit + false + positives),
        iou=_ratio(hit, false + positives),
        accuracy=_ratio(hit + negatives - false, (negatives + positives).expand(BINS)),
    )


def average_precision(binned: Tensor) -> float:
    """Sum over thresholds of precision times what recall grows by; as scikit-learn has it, a bin being one tie."""
    found = curve(binned)
    grown = found.recall - torch.cat([found.recall[1:], found.recall.new_zeros(1)])
    return float((found.precision * grown).sum())


def best_threshold(binned: Tensor, measure: str) -> float:
    """The threshold where a number of `Curve` is largest; among equals the nearest to 0.5."""
    found = curve(binned)
    values, places = getattr(found, measure)[1:], found.threshold[1:]
    equal = values == values.max()
    return float(places[equal][(places[equal] - 0.5).abs().argmin()])


def calibration(binned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean probability, share of positives and count of each of GROUPS equal parts of 0..1, float64 [GROUPS].

    Mean probabilities are those of the middles of bins, so right to 1/8192.
    """
    whole = binned.cpu().double()
    middles = (EDGES + torch.cat([EDGES[1:], EDGES.new_ones(1)])) / 2
    group = (EDGES * GROUPS).long()
    said, true, total = (
        torch.zeros(GROUPS, dtype=torch.float64).index_add_(0, group, values)
        for values in (whole.sum(0) * middles, whole[1], whole.sum(0))
    )
    return _ratio(said, total), _ratio(true, total), total


def calibration_error(binned: Tensor) -> float:
    """Expected calibration error: mean distance of probability and share of positives over the groups, by count."""
    said, true, total = calibration(binned)
    return float(_ratio(((said - true).abs() * total).sum(), total.sum()))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(1e-300), 0.0)
