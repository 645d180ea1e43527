"""Gradient checkpointing: the activations inside a network's blocks are computed again in the backward pass.

What stays from the forward pass is the input of each block. A network of timm without batch statistics has a switch of
its own. In all others the blocks are found (the outermost modules of a class that occurs more than once; a plain
sequence of layers, as in VGG, is cut into as many parts as the root of its length) and get a forward pass through
torch.utils.checkpoint.

Batch normalisation would take the statistics of each batch twice: its running mean and variance would move twice as
fast, without an error. Here they stand still during the second computation.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalecv.errors import ConfigError
from scalecv.models.norms import BatchNorm


def recompute_blocks(model: nn.Module, arch: str) -> int:
    """Let a network compute its activations again; how many blocks (or networks of timm) do so from now on.

    Raises: ConfigError: it has none that could.
    """
    seen = Counter(type(module) for module in model.modules())
    found = _switch(model, seen)
    if not found:
        for sequence in [m for m in model.modules() if type(m) is nn.Sequential and len(_cuts(m)) > 2]:
            sequence.__class__ = _recomputing(type(sequence), _SequenceAgain)
            found += 1
    if not found:
        raise ConfigError(
            f"train.recompute=true: {arch} has no blocks that occur more than once and no long sequence of layers; "
            "leave train.recompute out, and set train.micro_batch=auto if memory is short"
        )
    return found


def _switch(module: nn.Module, seen: Counter[type[nn.Module]]) -> int:
    switch = getattr(module, "set_grad_checkpointing", None)
    if callable(switch) and not _has_statistics(module):
        try:
            switch(True)
            return 1
        except (AssertionError, NotImplementedError):  # timm's way to say that this network has none
            pass
    found = 0
    for child in module.children():
        if _is_block(child, seen):
            child.__class__ = _recomputing(type(child), _BlockAgain)
            found += 1
        else:
            found += _switch(child, seen)
    return found


def _is_block(module: nn.Module, seen: Counter[type[nn.Module]]) -> bool:
    layers = sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())
    has_forward = type(module).forward is not nn.Module.forward and type(module) is not nn.Sequential
    return has_forward and seen[type(module)] > 1 and layers > 1 and not any(map(_is_stage, module.modules()))


def _is_stage(module: nn.Module) -> bool:
    """Whether it is a row of blocks of one kind."""
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    kinds = [type(child) for child in module.children() if any(True for _ in child.children())]
    return len(kinds) > 1 and len(kinds) == len(list(module.children())) and len(set(kinds)) == 1


def _has_statistics(module: nn.Module) -> bool:
    return any(isinstance(layer, BatchNorm) and layer.training for layer in module.modules())


class _BlockAgain(nn.Module):
    """Comes before a block's own class."""

    def forward(self, *given: Any, **named: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*given, **named)
        # A list may grow once the block is done, as DenseNet's does: the second computation needs it as it is now.
        given = tuple(list(one) if isinstance(one, list) else one for one in given)
        return _twice(self, super().forward, given, named)


class _SequenceAgain(nn.Sequential):
    """Comes before nn.Sequential: the layers, cut into parts that each begin with a layer that has weights."""

    def forward(self, input: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)  # type: ignore[no-untyped-call]
        layers, cuts = list(self), _cuts(self)
        step = math.ceil(len(cuts) / math.ceil(math.sqrt(len(cuts))))
        # A first layer that works in place would change the input that is kept for the second computation.
        begins = cuts[::step]
        for layer in layers[: begins[0]]:
            input = layer(input)
        for begin, end in zip(begins, [*begins[1:], len(layers)], strict=True):
            part = nn.Sequential(*layers[begin:end])
            input = _twice(self, part, (input,), {})
        return input


def _cuts(sequence: nn.Sequential) -> list[int]:
    """Where its convolutions and linear layers stand."""
    return [at for at, layer in enumerate(sequence) if isinstance(layer, nn.Conv2d | nn.Linear)]


def _twice(module: nn.Module, compute: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a part of `module` gives, to be computed again in the backward pass."""
    if torch.compiler.is_compiling():  # which cuts the graph itself, and updates buffers in the first part only
        return checkpoint(compute, *given, use_reentrant=False, **named)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _still(module)

    return checkpoint(compute, *given, use_reentrant=False, context_fn=contexts, **named)


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Let running statistics move in copies that are then thrown away."""
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm) and layer.training]
    kept = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    for layer, buffers in zip(layers, kept, strict=True):
        for name, value in buffers.items():
            setattr(layer, name, value.clone())
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, value in buffers.items():
                setattr(layer, name, value)


def _recomputing(kind: Any, how: Any) -> Any:
    """A class like `kind`, under the same name."""
    return type(kind.__name__, (how, kind), {"__module__": kind.__module__})
