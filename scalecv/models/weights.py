"""Starting weights: the library's own download, or a safetensors file behind a URI. Nothing is unpickled."""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from scalecv import storage
from scalecv.errors import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")
SHOWN = 5


def library_weights(what: str, fetch: Callable[[], T]) -> T:
    """What a library's download returns.

    Raises: ConfigError: it failed, mostly because the machine has no way to the library's server.
    """
    try:
        return fetch()
    except Exception as error:  # each library raises its own: URLError, HTTPError, HfHubHTTPError, RuntimeError …
        said = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(
            f"the ImageNet weights of {what} could not be had ({type(error).__name__}: {said}): put a safetensors "
            "file where the workers can read it and set model.weights=URI, or leave model.weights empty"
        ) from error


def load_weights(model: nn.Module, uri: str) -> list[str]:
    """Start from a safetensors file, or from the one in a bundle's folder; returns the names that did not fit.

    Raises: ConfigError: nothing there, not safetensors, or weights of another network.
    """
    import safetensors
    import safetensors.torch

    address = uri if uri.endswith(".safetensors") else storage.join(uri, "model.safetensors")
    try:
        state = safetensors.torch.load(storage.get(address))
    except FileNotFoundError:
        raise ConfigError(
            f"model.weights={uri}: there is no {storage.without_secrets(address)}; name a safetensors file, a bundle, "
            "or imagenet"
        ) from None
    except safetensors.SafetensorError as error:
        raise ConfigError(
            f"model.weights={uri} is not a safetensors file ({error}); pickled files (.pt, .pth) are not read: "
            "save the state dict with safetensors.torch.save_file"
        ) from None
    return load_state(model, state, uri)


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Copy the weights that fit by name and shape; returns (and logs) the network's names that did not.

    A first convolution for another number of channels is adapted by `adapt_channels`. Names may lack the prefix
    `encoder.` of a segmentation network, or carry the `module.` of a wrapper; then only that part must fit.
    Raises: ConfigError: fewer than half of the parameters fit.
    """
    own = model.state_dict()
    prefix, given = _best_names(own, state)
    first = next((name for name, value in own.items() if value.ndim == 4), "")
    fitting = {name: _fit(value, own[name], name == first) for name, value in given.items() if name in own}
    found = {name: value for name, value in fitting.items() if value is not None}
    parameters = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    matched = sum(name in found for name in parameters)
    left = [name for name in own if name not in found]
    if 2 * matched < len(parameters) or not parameters:
        foreign = sorted(set(given) - set(found))
        raise ConfigError(
            f"weights of another network in {where}: {matched} of {len(parameters)} parameters fit by name and shape, "
            f"at least half were expected; the network lacks {_some(left)}, the file has besides {_some(foreign)}"
        )
    model.load_state_dict(found, strict=False)
    if left:
        log.info("%d of %d weights not in %s start fresh: %s", len(left), len(own), where, _some(left))
    return left


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Weights [O, C, k, k] of a first convolution for `channels` input channels.

    The given channels are repeated in turn and scaled by C/channels, so that the output keeps its size.
    """
    before = weight.shape[1]
    turn = torch.arange(channels) % before
    return weight[:, turn] * (before / channels)


def _best_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The part of the network that the names are for, and the weights under its names."""
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    inner = {f"encoder.{name}": value for name, value in plain.items()}
    if sum(name in own for name in inner) > sum(name in own for name in plain):
        return "encoder.", inner
    return "", plain


def _fit(value: Tensor, own: Tensor, is_first_conv: bool) -> Tensor | None:
    if value.shape == own.shape:
        return value
    if is_first_conv and value.ndim == 4 and value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:]:
        return adapt_channels(value, own.shape[1])
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more
