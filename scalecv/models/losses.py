"""Terms of the loss, one number per sample, so that sums over any number of ranks are exact.

B samples, K classes, H x W pixels. Every term takes logits and a target and returns float32 [B], computed in
float32 also under autocast (float64 logits stay float64). Classification: logits [B, K], target int64 [B].
Segmentation: logits [B, K, H, W], or [B, 1, H, W] for two classes, target int64 [B, H, W]. Pixels marked
IGNORE count nowhere; a sample without labelled pixels gives 0. Upscaling: images and truth [B, C, H, W], of which
pixels that are NaN in the truth count nowhere. The caller takes sum(valid * loss) / (valid samples over all ranks and
accumulation steps).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scalecv.schema import IGNORE

SMOOTH = 1.0
"""Pixels added above and below the fractions of areas: an image without positives has a gradient."""


def cross_entropy(
    logits: Tensor, target: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy, averaged over the labelled pixels of a sample; for one logit per pixel the binary one.

    Args:
        class_weights: float [K]. A pixel (or sample) counts with the weight of its class; the sum is not divided by
            the weights that happen to be in the batch, as torch does it, for that would depend on the ranks.
        label_smoothing: share of the target that is spread evenly over the classes.
    """
    scores = _both_classes(_full(logits)) if logits.shape[1] == 1 else _full(logits)
    weights = None if class_weights is None else class_weights.to(scores)
    each = functional.cross_entropy(
        scores, target, weight=weights, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing
    )
    return _per_sample(each, target)


def bce(logits: Tensor, target: Tensor, pos_weight: float = 1.0, neg_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of two classes; a positive pixel (or sample) counts `pos_weight` times, others `neg_weight`.

    The sum is divided by the labelled pixels, not by their weights.
    """
    margin = _margin(_full(logits))
    positive = (target == 1).to(margin)
    each = functional.binary_cross_entropy_with_logits(margin, positive, reduction="none")
    return _per_sample(each * (neg_weight + (pos_weight - neg_weight) * positive), target)


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """Focal loss (1 - p)^gamma * -log p of the true class's probability p (Lin et al. 2017).

    Args:
        gamma: focusing exponent; 0 is cross-entropy.
        alpha: for two classes the weight of positives, 1 - alpha that of negatives; None weighs both with 1.
    """
    scores = _both_classes(_full(logits)) if logits.shape[1] == 1 else _full(logits)
    log_p = -functional.cross_entropy(scores, target, ignore_index=IGNORE, reduction="none")
    # Below one step of float32 the power of a fractional gamma would have an infinite gradient.
    doubt = (-torch.expm1(log_p)).clamp_min(1e-7)
    each = doubt**gamma * -log_p
    if alpha is not None:
        each = each * (1 - alpha + (2 * alpha - 1) * (target == 1).to(each))
    return _per_sample(each, target)


def dice(logits: Tensor, target: Tensor, smooth: float = SMOOTH) -> Tensor:
    """1 - soft Dice of each image: of the foreground for two classes, else the mean over all classes."""
    inside, predicted, true = _areas(logits, target)
    each = 1 - (2 * inside + smooth) / (predicted + true + smooth)
    return _if_labelled(each.mean(1), target)


def jaccard(logits: Tensor, target: Tensor, smooth: float = SMOOTH) -> Tensor:
    """1 - soft intersection over union of each image, averaged as in `dice`."""
    return _if_labelled((1 - _iou(_areas(logits, target), smooth)).mean(1), target)


def tversky(logits: Tensor, target: Tensor, alpha: float = 0.3, beta: float = 0.7, smooth: float = SMOOTH) -> Tensor:
    """1 - Tversky index TP / (TP + alpha FP + beta FN) of soft areas, averaged as in `dice` (Salehi et al. 2017)."""
    inside, predicted, true = _areas(logits, target)
    wrong = alpha * (predicted - inside) + beta * (true - inside)
    return _if_labelled((1 - (inside + smooth) / (inside + wrong + smooth)).mean(1), target)


def pos_neg_iou(logits: Tensor, target: Tensor, pos: float = 0.85, neg: float = 0.15, smooth: float = SMOOTH) -> Tensor:
    """Of each image `pos` (1 - soft IoU of the foreground) + `neg` (1 - that of the background); two classes."""
    margin = _margin(_full(logits)).unsqueeze(1)
    swapped = torch.where(target == IGNORE, IGNORE, 1 - target)
    foreground, background = _areas(margin, target), _areas(-margin, swapped)
    each = pos * (1 - _iou(foreground, smooth)) + neg * (1 - _iou(background, smooth))
    return _if_labelled(each[:, 0], target)


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovász extension of 1 - IoU of each image (Berman et al. 2018), over its labelled pixels.

    Two classes: of the hinge errors of the foreground. More: of 1 - p of each class, mean over the classes present.
    """
    scores, labelled = _full(logits), (target != IGNORE).flatten(1)
    if scores.shape[1] <= 2:
        sign = torch.where(target == 1, 1.0, -1.0)
        errors = torch.relu(1 - _margin(scores) * sign).flatten(1)
        return _lovasz(errors, (target == 1).flatten(1), labelled)
    p, true = _shares(scores, target)
    each, there = [], true.flatten(2).any(2)
    for place in range(scores.shape[1]):
        truth = true[:, place].flatten(1)
        errors = torch.where(truth, 1 - p[:, place].flatten(1), p[:, place].flatten(1))
        each.append(torch.where(there[:, place], _lovasz(errors, truth, labelled), 0.0))
    return torch.stack(each, 1).sum(1) / there.sum(1).clamp_min(1)


def l1(images: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of two images [C, H, W] each."""
    return _per_image(_difference(images, truth).abs(), truth)


def charbonnier(images: Tensor, truth: Tensor) -> Tensor:
    """Mean of sqrt(difference^2 + 1e-6): l1 with a gradient at zero (Charbonnier et al. 1994)."""
    return _per_image((_difference(images, truth).square() + 1e-6).sqrt(), truth)


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared difference of two images."""
    return _per_image(_difference(images, truth).square(), truth)


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of terms, float32 [B].

    Raises: ValueError: a term without a weight, or no term at all.
    """
    if not terms or set(terms) - set(weights):
        raise ValueError(f"terms {sorted(terms)} need a weight each, there are {sorted(weights)}")
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum(0)


def balanced_weights(counts: Sequence[int] | Tensor) -> Tensor:
    """Class weights float32 [K] = rows / (classes * rows of the class); over the training split their mean is 1.

    Args:
        counts: rows (or labelled pixels) of each class. Classes without any get 0 and are not counted.
    """
    rows = torch.as_tensor(counts, dtype=torch.float64)
    present = rows > 0
    balanced = rows.sum() / (present.sum().clamp_min(1) * rows.clamp_min(1))
    return torch.where(present, balanced, 0.0).float()


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _both_classes(logits: Tensor) -> Tensor:
    """[B, 1, ...] to [B, 2, ...]: softmax over (0, z) is sigmoid(z)."""
    return torch.cat([torch.zeros_like(logits), logits], 1)


def _margin(logits: Tensor) -> Tensor:
    """Log-odds [B, ...] of the second class, from one logit or two."""
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def _per_sample(each: Tensor, target: Tensor) -> Tensor:
    """Mean over the labelled pixels of each sample, [B]."""
    labelled = target != IGNORE
    each = torch.where(labelled, each, 0.0)
    if each.ndim == 1:
        return each
    return each.flatten(1).sum(1) / labelled.flatten(1).sum(1).clamp_min(1)


def _difference(images: Tensor, truth: Tensor) -> Tensor:
    """Of two images, 0 where the truth has no data: what is made of it must have a finite gradient."""
    return torch.where(truth.isnan(), 0.0, _full(images) - truth)


def _per_image(each: Tensor, truth: Tensor) -> Tensor:
    """Mean over the values of each image that the truth has, [B]."""
    has_data = ~truth.isnan()
    return torch.where(has_data, each, 0.0).flatten(1).sum(1) / has_data.flatten(1).sum(1).clamp_min(1)


def _if_labelled(each: Tensor, target: Tensor) -> Tensor:
    return torch.where((target != IGNORE).flatten(1).any(1), each, 0.0)


def _shares(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and truth (bool), each [B, 1, H, W] for two classes, else [B, K, H, W]."""
    if scores.shape[1] <= 2:
        # Not sigmoid(): its gradient is exactly 0 from a logit of 17 on, where a false alarm is worst.
        return functional.logsigmoid(_margin(scores)).exp().unsqueeze(1), (target == 1).unsqueeze(1)
    places = torch.arange(scores.shape[1], device=target.device).view(1, -1, 1, 1)
    return torch.softmax(scores, 1), target.unsqueeze(1) == places


def _areas(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, predicted and true area in labelled pixels, each [B, 1] for two classes, else [B, K]."""
    p, true = _shares(_full(logits), target)
    t = true.to(p)
    p = p * (target != IGNORE).unsqueeze(1)
    return (p * t).sum((2, 3)), p.sum((2, 3)), t.sum((2, 3))


def _iou(areas: tuple[Tensor, Tensor, Tensor], smooth: float) -> Tensor:
    inside, predicted, true = areas
    return (inside + smooth) / (predicted + true - inside + smooth)


def _lovasz(errors: Tensor, truth: Tensor, labelled: Tensor) -> Tensor:
    """Sum of the errors from the largest on, each times what it adds to 1 - IoU; [B, N] each, float32 [B]."""
    errors = torch.where(labelled, errors, 0.0)
    # Pixels that are not labelled come last: what they add is multiplied by zero.
    _, order = torch.where(labelled, errors.detach(), -1.0).sort(1, descending=True)
    true = truth.gather(1, order).to(errors)
    total = true.sum(1, keepdim=True)
    lost = 1 - (total - true.cumsum(1)) / (total + (1 - true).cumsum(1))
    added = torch.diff(lost, dim=1, prepend=torch.zeros_like(total))
    return (errors.gather(1, order) * added).sum(1)
