"""Starting weights from a file behind a URI: safetensors, or one of torch.save; and what of them a network takes.

The only place that opens a pickle, of the user's own naming, and there torch's restricted reader alone does it:
what is more than tensors in plain containers is refused, and nothing else is tried.
"""

import io
import json
import logging
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalecv import storage
from scalecv.errors import ConfigError
from scalecv.models.bands import NAMED, Init, adapt_channels
from scalecv.models.parts import head_names

log = logging.getLogger(__name__)
Scope = Literal["fitting", "all", "encoder"]
SHOWN = 5
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
MOST_HEADER_BYTES = 16 << 20
WRAPPED_AS = ("state_dict", "model_state_dict", "model", "module", "weights")
"""Keys under which trainers keep the weights in a file of torch.save."""


@dataclass(frozen=True)
class Loaded:
    """What of some starting weights a network took."""

    source: str
    """Where they come from."""
    loaded: tuple[str, ...]
    """The network's names that were taken."""
    left: tuple[str, ...]
    """The network's names that start fresh."""
    unused: tuple[str, ...]
    """Names of the source that the network has no place for."""
    adapted: str
    """How the first layer was adapted to other bands, in words; empty where it was not."""

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.left)
        parts = [f"{len(self.loaded)} of {total} weights from {storage.without_secrets(self.source)}"]
        parts += [self.adapted] if self.adapted else []
        parts += [f"start fresh: {_some(list(self.left))}"] if self.left else []
        parts += [f"not used: {_some(list(self.unused))}"] if self.unused else []
        return "; ".join(parts)


class BadWeights(ValueError):
    """Bytes that are not weights; says why."""


def load_weights(model: nn.Module, uri: str, *, init: Init = "copy", scope: Scope = "fitting") -> Loaded:
    """Start from a safetensors file, the one in a bundle's folder, or a state dict that torch.save wrote.

    Raises: ConfigError: nothing there, not weights, or those of another network.
    """
    return load_state(model, read_state(uri), uri, init=init, scope=scope)


def read_state(uri: str) -> dict[str, Tensor]:
    """The weights in a file, by their names there.

    Raises: ConfigError: nothing there, or not weights.
    """
    is_pickled = uri.lower().endswith(PICKLED)
    address = uri if is_pickled or uri.endswith(".safetensors") else storage.join(uri, "model.safetensors")
    try:
        data = storage.get(address)
        return pickled_tensors(data) if is_pickled else tensors(data)
    except FileNotFoundError:
        raise ConfigError(
            f"model.weights={uri}: there is no {storage.without_secrets(address)}; name a safetensors file, a bundle, "
            "a state dict of torch.save (.pt, .pth), runs:/ID, models:/NAME@ALIAS, or imagenet"
        ) from None
    except BadWeights as error:
        raise ConfigError(
            f"model.weights={uri} cannot be read: {error}. Save the state dict with safetensors.torch.save_file"
        ) from None


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


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], where: str, *, init: Init = "copy", scope: Scope = "fitting"
) -> Loaded:
    """Copy weights by name and shape; says (and logs) what was taken and what was left.

    The layer that takes the image is adapted to its number of bands by `adapt_channels`. Names may be those of an
    encoder alone, of a network that has this one as its encoder, or carry the `module.` of a wrapper or the
    `network.` of one behind a stage that enlarges.

    Args:
        model: changed in place.
        state: weights by name.
        where: they come from, for messages.
        init: how bands are adapted.
        scope: see `Model.weights_scope`.
    Raises: ConfigError: fewer than half of the parameters fit; with `all` or `encoder`, one of them does not.
    """
    own, parameters = model.state_dict(), [name for name, _ in model.named_parameters()]
    prefix, given = _best_names(own, state)
    wanted = set(own) - (head_names(model) if scope == "encoder" else set())
    first = [name for name in _convolutions(model) if name in own and name in given and given[name].ndim == 4]
    bands = (given[first[0]].shape[1], own[first[0]].shape[1]) if first else (0, 0)
    found, adapted = {}, []
    for name in (name for name in own if name in given and name in wanted):
        value, target = given[name], own[name]
        if name in first and _takes_image(value, target, bands):
            value = adapt_channels(value, bands[1], init)
            adapted += [name] if not torch.equal(value, given[name]) else []
        if value.shape == target.shape:
            found[name] = value
    told = Loaded(
        where,
        loaded=tuple(name for name in own if name in found),
        left=tuple(name for name in own if name not in found),
        unused=tuple(sorted(name for name in given if name not in found)),
        adapted=f"{', '.join(adapted)} from {bands[0]} to {bands[1]} bands by {_word(init)}" if adapted else "",
    )
    part = "" if scope == "all" else prefix
    _check_enough(told, [name for name in parameters if name in wanted and name.startswith(part)], scope)
    model.load_state_dict(found, strict=False)
    log.info("%s", told)
    return told


def _check_enough(told: Loaded, parameters: list[str], scope: Scope) -> None:
    """Raises: ConfigError: too few of the parameters that should fit do."""
    missing = set(parameters) - set(told.loaded)
    if parameters and (2 * len(missing) <= len(parameters) if scope == "fitting" else not missing):
        return
    matched = len(parameters) - len(missing)
    if scope != "fitting" and 2 * matched >= len(parameters):
        lacks = [name for name in parameters if name in missing]
        fix = "fitting, or encoder to start the head fresh" if scope == "all" else "fitting"
        raise ConfigError(
            f"model.weights_scope={scope}, but {told.source} has no weights of this name and shape for {_some(lacks)} "
            f"({matched} of {len(parameters)} fit): set model.weights_scope={fix}"
        )
    raise ConfigError(
        f"weights of another network in {told.source}: {matched} of {len(parameters)} parameters fit by name and "
        f"shape, {'at least half were' if scope == 'fitting' else 'all were'} expected; the network lacks "
        f"{_some(list(told.left))}, the file has besides {_some(list(told.unused))}"
    )


def _convolutions(model: nn.Module) -> list[str]:
    """Names of the weights of two-dimensional convolutions, in the network's order."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _takes_image(value: Tensor, own: Tensor, bands: tuple[int, int]) -> bool:
    """Whether a convolution has the bands of the image as channels (a first layer of several branches has several)."""
    shapes = value.ndim == 4 and (value.shape[0], *value.shape[2:]) == (own.shape[0], *own.shape[2:])
    return shapes and (value.shape[1], own.shape[1]) == bands and (bands[0] != bands[1] or bands[0] == len(NAMED))


def _best_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The part of the network that the names are for, and the weights under its names."""
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    behind_stage = {name.removeprefix("network."): value for name, value in plain.items()}
    if sum(name in own for name in behind_stage) > sum(name in own for name in plain):
        plain = behind_stage
    found = ("", plain)
    for add in ("encoder.", "encoder.model."):
        inner = {f"{add}{name}": value for name, value in plain.items()}
        outer = {name.removeprefix(add): value for name, value in plain.items() if name.startswith(add)}
        found = max(found, ("encoder.", inner), ("", outer), key=lambda one: sum(name in own for name in one[1]))
    return found


def _word(init: Init) -> str:
    return init if isinstance(init, str) else f"({', '.join(init)})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more
