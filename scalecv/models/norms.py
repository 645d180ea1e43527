"""What stands in place of batch normalisation: the same over workers, per sample, or frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with fixed statistics: `train()` leaves them as they are, weight and bias still learn."""

    after: nn.Module

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stays in evaluation mode, whatever `mode` says; what comes after the norm does as asked."""
        super().train(False)
        self.after.train(mode)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        out: Tensor = self.after(super().forward(input))
        return out


class GroupNormThen(nn.GroupNorm):
    """Group normalisation, then what the replaced layer did after its norm (timm puts the activation there)."""

    after: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        out: Tensor = self.after(super().forward(input))
        return out


class SyncBatchNorm(BatchNorm):
    """Batch normalisation over all workers, on GPUs by torch's own layer, and also on CPUs.

    It is no nn.SyncBatchNorm, because DistributedDataParallel refuses those on CPUs.
    """

    after: nn.Module
    process_group = None
    is_alone = False

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] to the same shape; in training a collective call, so all ranks run forward equally often."""
        has_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        together = self.training and has_ranks and not self.is_alone
        if not together:
            out = super().forward(input)
        elif input.device.type == "cpu":
            out = self._over_ranks(input)
        else:
            out = nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]  # has all that it reads
        after: Tensor = self.after(out)
        return after

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected [B, C, ...], found {tuple(input.shape)}")

    def _check_non_zero_input_channels(self, input: Tensor) -> None:
        self._check_input_dim(input)

    def _over_ranks(self, input: Tensor) -> Tensor:
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.float()
        local = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        total = _Sum.apply(local)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean.view(shape)
        var = _Sum.apply(centred.square().sum(dims)) / count
        seen = self.num_batches_tracked
        if self.running_mean is not None and self.running_var is not None and seen is not None:
            with torch.no_grad():
                seen.add_(1)
                share = 1 / float(seen) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((var * count / (count - 1).clamp_min(1)).to(self.running_var), share)
        out: Tensor = centred * torch.rsqrt(var.view(shape) + self.eps)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model normalise without the other workers, so that nobody needs to take part."""
    layers = [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
    for layer in layers:
        layer.is_alone = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_alone = False


class _Sum(torch.autograd.Function):
    """The sum over ranks; each rank's result depends on all inputs, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def change_norm(model: nn.Module, norm: Literal["batch", "sync", "group", "frozen"]) -> nn.Module:
    """The network with another normalisation in place of each BatchNorm; names of weights stay as they are.

    batch: as built. sync: statistics over all workers. group: GroupNorm with the most groups, up to 32, that divide
    the channels. frozen: the statistics that the starting weights brought, for ever.
    """
    return model if norm == "batch" else _replaced(model, norm)


def groups_of(channels: int) -> int:
    """The largest number up to 32 that divides `channels`."""
    return max(n for n in range(1, 33) if channels % n == 0)


def _replaced(module: nn.Module, norm: str) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d) or (norm == "sync" and isinstance(module, BatchNorm)):
        return _other_norm(module, norm)
    for name, child in module.named_children():
        new = _replaced(child, norm)
        if new is not child:
            setattr(module, name, new)
    return module


def _other_norm(old: BatchNorm, norm: str) -> nn.Module:
    new: FrozenBatchNorm2d | GroupNormThen | SyncBatchNorm
    channels = old.num_features
    if norm == "group":
        new = GroupNormThen(groups_of(channels), channels, old.eps, old.affine)
    elif norm == "sync":
        new = SyncBatchNorm(channels, old.eps, old.momentum, old.affine, old.track_running_stats)
    else:
        new = FrozenBatchNorm2d(channels, old.eps, old.momentum, old.affine, old.track_running_stats)
    new.to(next((t.device for t in (*old.parameters(), *old.buffers())), "cpu"))
    if norm != "group":
        for name, buffer in old.named_buffers(recurse=False):
            setattr(new, name, buffer)
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    # timm's BatchNormAct2d is a BatchNorm2d with a drop and an activation behind it.
    new.after = nn.Sequential(*old.children()) if list(old.children()) else nn.Identity()
    return new.train(old.training)
