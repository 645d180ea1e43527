"""Starting weights: the library's own download, or a file behind a URI: safetensors, or one of torch.save.

The only place that opens a pickle, of the user's own naming, and there torch's restricted reader alone does it:
what is more than tensors in plain containers is refused, and nothing else is tried.
"""

import io
import json
import logging
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scalecv import storage
from scalecv.errors import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")
SHOWN = 5
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
MOST_HEADER_BYTES = 16 << 20
WRAPPED_AS = ("state_dict", "model_state_dict", "model", "module", "weights")
"""Keys under which trainers keep the weights in a file of torch.save."""


class BadWeights(ValueError):
    """Bytes that are not weights; says why."""


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
    """Start from a safetensors file, the one in a bundle's folder, or a state dict that torch.save wrote.

    Returns: the names that did not fit.
    Raises: ConfigError: nothing there, not weights, or those of another network.
    """
    is_pickled = uri.lower().endswith(PICKLED)
    address = uri if is_pickled or uri.endswith(".safetensors") else storage.join(uri, "model.safetensors")
    try:
        data = storage.get(address)
        state = pickled_tensors(data) if is_pickled else tensors(data)
    except FileNotFoundError:
        raise ConfigError(
            f"model.weights={uri}: there is no {storage.without_secrets(address)}; name a safetensors file, a bundle, "
            "a state dict of torch.save (.pt, .pth), or imagenet"
        ) from None
    except BadWeights as error:
        raise ConfigError(
            f"model.weights={uri} cannot be read: {error}. Save the state dict with safetensors.torch.save_file"
        ) from None
    return load_state(model, state, uri)


def tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises: BadWeights: damaged, of another format, or a name that stands twice, which two readers may read differently.
    """
    import safetensors
    import safetensors.torch

    try:
        (size,) = struct.unpack("<Q", data[:8])
        if size > MOST_HEADER_BYTES:
            raise BadWeights(f"not a safetensors file, its header would have {size} bytes")
        found = safetensors.torch.load(data)
        json.loads(data[8 : 8 + size], object_pairs_hook=_once)
    except (safetensors.SafetensorError, struct.error, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise BadWeights(f"not a safetensors file ({_line(error)})") from None
    return found


def pickled_tensors(data: bytes) -> dict[str, Tensor]:
    """The state dict in a file of torch.save, read without running anything that it names.

    Raises: BadWeights: an older or other format, or anything besides tensors and plain values.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            members = packed.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise BadWeights(f"not a file that torch.save has written since 1.6 ({_line(error)})") from None
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise BadWeights("two members of the archive have one name")
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data) for member in members):
        raise BadWeights("its members are packed, torch.save stores them plainly")
    try:
        tree = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted reader raises many kinds; none of them is answered by another try
        raise BadWeights(f"holds more than tensors in plain containers, or is damaged ({_line(error)})") from None
    for node in [tree, *(tree.get(key) for key in WRAPPED_AS if isinstance(tree, Mapping))]:
        found = _plain_tensors(node)
        if found:
            return found
    raise BadWeights("holds no state dict, that is, names with their tensors")


def _plain_tensors(node: Any) -> dict[str, Tensor]:
    if not isinstance(node, Mapping) or not all(isinstance(name, str) for name in node):
        return {}
    if not all(isinstance(value, Tensor) and value.layout == torch.strided for value in node.values()):
        return {}
    return {name: value.detach() for name, value in node.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise BadWeights(f"'{name[:100]}' stands twice in the header")
        names.add(name)
    return dict(pairs)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Copy the weights that fit by name and shape; returns (and logs) the network's names that did not.

    A first convolution for another number of channels is adapted by `adapt_channels`. Names may lack the prefix
    `encoder.` of a segmentation network, or carry the `module.` of a wrapper or the `network.` of one behind a stage;
    then only that part must fit.
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
    behind_stage = {name.removeprefix("network."): value for name, value in plain.items()}
    if sum(name in own for name in behind_stage) > sum(name in own for name in plain):
        plain = behind_stage
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
