"""Terms of the loss, one number per sample, so that sums over any number of ranks are exact.

B samples, K classes, H x W pixels. Every term takes logits and a target and returns float32 [B], computed in
float32 also under autocast (float64 logits stay float64). Classification: logits [B, K], target int64 [B].
Segmentation: logits [B, K, H, W], or [B, 1, H, W] for two classes, target int64 [B, H, W]. Pixels marked
IGNORE count nowhere; a sample without labelled pixels gives 0. Upscaling: images and truth [B, C, H, W]. The caller
takes sum(valid * loss) / (valid samples over all ranks and accumulation steps).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scalecv.schema import IGNORE

SMOOTH = 1.0
"""Pixels added above and below the fraction in dice and jaccard: an image without positives has a gradient."""


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


def bce(logits: Tensor, target: Tensor, pos_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of two classes; a positive pixel (or sample) counts `pos_weight` times."""
    margin = _margin(_full(logits))
    each = functional.binary_cross_entropy_with_logits(
        margin, (target == 1).to(margin), pos_weight=margin.new_tensor(pos_weight), reduction="none"
    )
    return _per_sample(each, target)


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss (1 - p)^gamma * -log p of the true class's probability p (Lin et al. 2017, without alpha)."""
    scores = _both_classes(_full(logits)) if logits.shape[1] == 1 else _full(logits)
    log_p = -functional.cross_entropy(scores, target, ignore_index=IGNORE, reduction="none")
    # Below one step of float32 the power of a fractional gamma would have an infinite gradient.
    doubt = (-torch.expm1(log_p)).clamp_min(1e-7)
    return _per_sample(doubt**gamma * -log_p, target)


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 - soft Dice of each image: of the foreground for two classes, else the mean over all classes."""
    inside, predicted, true = _areas(logits, target)
    each = 1 - (2 * inside + SMOOTH) / (predicted + true + SMOOTH)
    return _if_labelled(each.mean(1), target)


def jaccard(logits: Tensor, target: Tensor) -> Tensor:
    """1 - soft intersection over union of each image, averaged as in `dice`."""
    inside, predicted, true = _areas(logits, target)
    each = 1 - (inside + SMOOTH) / (predicted + true - inside + SMOOTH)
    return _if_labelled(each.mean(1), target)


def l1(images: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of two images [C, H, W] each."""
    return (_full(images) - truth).abs().flatten(1).mean(1)


def charbonnier(images: Tensor, truth: Tensor) -> Tensor:
    """Mean of sqrt(difference^2 + 1e-6): l1 with a gradient at zero (Charbonnier et al. 1994)."""
    return ((_full(images) - truth).square() + 1e-6).sqrt().flatten(1).mean(1)


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared difference of two images."""
    return (_full(images) - truth).square().flatten(1).mean(1)


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


def _if_labelled(each: Tensor, target: Tensor) -> Tensor:
    return torch.where((target != IGNORE).flatten(1).any(1), each, 0.0)


def _areas(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, predicted and true area in labelled pixels, each [B, 1] for two classes, else [B, K]."""
    scores = _full(logits)
    labelled = (target != IGNORE).unsqueeze(1)
    if scores.shape[1] <= 2:
        p = torch.sigmoid(_margin(scores)).unsqueeze(1)
        t = (target == 1).unsqueeze(1).to(p)
    else:
        p = torch.softmax(scores, 1)
        places = torch.arange(scores.shape[1], device=target.device).view(1, -1, 1, 1)
        t = (target.unsqueeze(1) == places).to(p)
    p = p * labelled
    return (p * t).sum((2, 3)), p.sum((2, 3)), t.sum((2, 3))
