"""Optimiser, learning rate as a function of the update, and decisions that follow the metric."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from scalecv.config import Train

if TYPE_CHECKING:
    import torch


def build_optimizer(model: "torch.nn.Module", train: Train) -> "torch.optim.Optimizer":
    """The optimiser of an experiment; vectors (biases, normalisation) are left out of weight decay.

    Parameters with a factor of their own learning rate (`train.lr_factors`) are groups of their own, with `lr_factor`.
    It is torch's fused one where device and type of all weights have it, else its default. The fused ones read
    gradients as they lie in memory: see `match_layouts`.
    """
    import torch

    from scalecv.models.enlarged import Enlarged
    from scalecv.models.parts import factors_of

    learning = model.network if isinstance(model, Enlarged) else model
    factors = factors_of(learning, train.lr_factors)
    named = [(factors.get(name, 1.0), p) for name, p in learning.named_parameters() if p.requires_grad]
    learns = [p for _, p in named]
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys([1.0, *train.lr_factors.values()]):
        own = [p for its, p in named if its == factor]
        shared = {"lr": train.lr * factor, "lr_factor": factor}
        groups += [
            {"params": [p for p in own if p.ndim > 1], "weight_decay": train.weight_decay, **shared},
            {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0, **shared},
        ]
    kinds = {(p.device.type, p.dtype) for p in learns}
    fused = True if kinds <= {(device, torch.float32) for device in ("cuda", "cpu")} else None
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, train.lr, train.momentum, nesterov=train.momentum > 0, fused=fused)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=train.lr, fused=fused)


def match_layouts(optimizer: "torch.optim.Optimizer") -> None:
    """Lay each gradient out in memory as its weight.

    A fused optimiser of torch 2.15 takes the two as rows of numbers; where one is channels_last and the other is not
    it would give every number to another weight, without an error.
    """
    import torch

    for group in optimizer.param_groups:
        for weight in group["params"] if group.get("fused") else ():
            gradient = weight.grad
            if gradient is None or gradient.stride() == weight.stride():
                continue
            sides = zip(weight.shape, weight.stride(), gradient.stride(), strict=True)
            if any(length > 1 and one != other for length, one, other in sides):
                weight.grad = torch.empty_like(weight).copy_(gradient)


def set_rate(optimizer: "torch.optim.Optimizer", lr: float) -> None:
    """Let the next update go by a learning rate, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def learning_rate(train: Train, update: int, steps_per_epoch: int, plateau_scale: float = 1.0) -> float:
    """The learning rate of one update, counted from 0 over the whole run.

    Linear warm-up, then constant, cosine to zero (Loshchilov and Hutter, 2017, without restarts), or constant times
    what the plateau rule has left.
    """
    warmup = train.warmup_epochs * steps_per_epoch
    if update < warmup:
        return train.lr * (update + 1) / warmup
    if train.schedule == "cosine":
        span = max(1.0, train.epochs * steps_per_epoch - warmup)
        return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (update - warmup) / span)))
    return train.lr * (plateau_scale if train.schedule == "plateau" else 1.0)


@dataclass(frozen=True)
class Progress:
    """What the metric has said so far; decided on rank 0, saved in every checkpoint."""

    best: float | None = None
    best_epoch: int = -1
    since_best: int = 0
    """Epochs without improvement."""
    plateau_wait: int = 0
    plateau_scale: float = 1.0

    def after(self, value: float, epoch: int, train: Train, *, larger_is_better: bool) -> "Progress":
        """The progress after one more validation."""
        sign = 1.0 if larger_is_better else -1.0
        improved = math.isfinite(value) and (
            self.best is None or sign * (value - self.best) > train.early_stop_min_delta
        )
        if improved:
            return replace(self, best=value, best_epoch=epoch, since_best=0, plateau_wait=0)
        wait, scale = self.plateau_wait + 1, self.plateau_scale
        if wait > train.plateau_patience:
            wait, scale = 0, scale * train.plateau_factor
        return replace(self, since_best=self.since_best + 1, plateau_wait=wait, plateau_scale=scale)

    def stops(self, train: Train) -> bool:
        """Whether early stopping ends the run now."""
        return train.early_stop_patience is not None and self.since_best >= train.early_stop_patience
