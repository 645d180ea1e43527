"""Parts of a network by dotted names: its encoder and head, what is frozen, what learns at a rate of its own."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import nn

from scalecv.errors import ConfigError, nearest


def names_under(model: nn.Module, prefix: str, key: str) -> set[str]:
    """Names of the parameters and buffers of a module, or of one parameter.

    Args:
        model: the network.
        prefix: a dotted name; `encoder` is all but the head in every network.
        key: of the experiment, for the error.
    Raises: ConfigError: nothing has that name, with the nearest that is there.
    """
    every = tensor_names(model)
    if prefix == "encoder":
        return every - head_names(model)
    found = {name for name in every if name == prefix or name.startswith(f"{prefix}.")}
    if not found:
        known = sorted({".".join(name.split(".")[:depth]) for name in every for depth in range(1, name.count(".") + 2)})
        top = ", ".join(dict.fromkeys(name.split(".")[0] for name in model.state_dict()))
        near = nearest(prefix, [one for one in known if one.count(".") == prefix.count(".")] or known)
        raise ConfigError(f"{key}: no part of the network with weights is called '{prefix}'{near or f'; it has {top}'}")
    return found


def tensor_names(model: nn.Module) -> set[str]:
    """Names of all parameters and buffers."""
    return {name for name, _ in chain(model.named_parameters(), model.named_buffers())}


def head_names(model: nn.Module) -> set[str]:
    """Names of what makes logits of features: all but a module called encoder, else the last layer with weights."""
    every = tensor_names(model)
    inner = {name for name in every if name.startswith("encoder.")}
    if inner:
        return every - inner
    layers = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    last = f"{layers[-1]}." if layers else ""
    return {name for name in every if name.startswith(last)}


class _StaysAsItIs(nn.Module):
    """Comes before the class of a frozen module: `train()` leaves it in evaluation mode, with all below it."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def freeze(model: nn.Module, what: str | Iterable[str]) -> int:
    """Freeze parts of a network: no gradient, and evaluation mode for good (batch statistics as they are, no dropout).

    Args:
        model: changed in place; names of weights stay as they are.
        what: none, encoder, or dotted names of modules.
    Returns: how many parameters (numbers) are frozen.
    Raises: ConfigError: a name that is not there, or nothing is left that learns.
    """
    if what == "none":
        return 0
    prefixes = [what] if isinstance(what, str) else list(what)
    frozen = set().union(*(names_under(model, prefix, "model.freeze") for prefix in prefixes))
    parameters = dict(model.named_parameters())
    if frozen >= set(parameters):
        raise ConfigError(f"model.freeze={', '.join(prefixes)} leaves nothing that could learn")
    for name in frozen & set(parameters):
        parameters[name].requires_grad_(False)
    for module in _roots(model, "", frozen):
        kind = type(module)
        module.__class__ = type(kind.__name__, (_StaysAsItIs, kind), {"__module__": kind.__module__})
        module.train(False)
    return sum(parameters[name].numel() for name in frozen & set(parameters))


def _roots(module: nn.Module, at: str, frozen: set[str]) -> list[nn.Module]:
    """The outermost modules whose tensors are all frozen."""
    names = {f"{at}{name}" for name in tensor_names(module)}
    if names and names <= frozen:
        return [module]
    below = [_roots(child, f"{at}{name}.", frozen) for name, child in module.named_children()]
    return [root for roots in below for root in roots]


def factors_of(model: nn.Module, factors: Mapping[str, float]) -> dict[str, float]:
    """The factor of the learning rate of each parameter that learns and has one.

    Raises: ConfigError: a name that is not there, or all of whose parameters are frozen.
    """
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, float] = {}
    # A longer name is nearer to the parameter; encoder stands for more than its letters say, so it comes first.
    for prefix in sorted(factors, key=lambda one: (one != "encoder", len(one))):
        names = names_under(model, prefix, "train.lr_factors") & learns
        if not names:
            raise ConfigError(
                f"train.lr_factors: all of '{prefix}' is frozen by model.freeze; remove it from one of the two"
            )
        found |= dict.fromkeys(names, factors[prefix])
    return found
