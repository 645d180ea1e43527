"""A checkpoint = a bundle plus what training needs to go on; complete when its manifest is there and fits.

    RUN/checkpoints/00000120-1f6e2c0a/
        model.safetensors bundle.json       usable as a bundle by itself
        resume.safetensors resume.json      optimiser tensors; position, scheduler, scaler, history
        manifest.json                       written last: size and SHA-256 of each part

The folder's name holds the number of updates and a hash of the content, so nothing is ever written over.
Which checkpoint is the newest is decided by these manifests alone.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalecv import storage
from scalecv.errors import IntegrityError

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
STATE = "resume.json"
TENSORS = "resume.safetensors"
NAME = re.compile(r"^\d{8}-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on storage."""

    uri: str
    updates: int
    metric: float | None
    parts: dict[str, Any]


def save(run: str, parts: dict[str, bytes], updates: int, metric: float | None) -> Checkpoint:
    """Write a checkpoint: the parts first, the manifest last."""
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)} for name, data in parts.items()}
    content = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    uri = storage.join(run, "checkpoints", f"{updates:08d}-{content[:8]}")
    for name, data in parts.items():
        storage.put(storage.join(uri, name), data)
    manifest = {"format": 1, "updates": updates, "metric": metric, "parts": sums}
    storage.put(storage.join(uri, MANIFEST), json.dumps(manifest, indent=1).encode())
    return Checkpoint(uri, updates, metric, sums)


def complete(run: str) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints whose manifest is there and readable, newest first, and what was passed over and why."""
    found, skipped = [], []
    for name in sorted(storage.list_names(storage.join(run, "checkpoints")), reverse=True):
        if not NAME.match(name):
            continue
        uri = storage.join(run, "checkpoints", name)
        try:
            manifest = json.loads(storage.get(storage.join(uri, MANIFEST)))
            found.append(Checkpoint(uri, int(manifest["updates"]), manifest["metric"], dict(manifest["parts"])))
        except FileNotFoundError:
            skipped.append(f"{uri}: not complete (no manifest)")
        except (ValueError, KeyError, TypeError):
            skipped.append(f"{uri}: its manifest is damaged")
    return found, skipped


def read(checkpoint: Checkpoint) -> dict[str, bytes]:
    """All parts of a checkpoint, each checked against its size and hash.

    Raises: IntegrityError: a part is missing or has other bytes than were written.
    """
    out = {}
    for name, told in checkpoint.parts.items():
        try:
            out[name] = storage.get(storage.join(checkpoint.uri, name), told["size_bytes"], told["sha256"])
        except FileNotFoundError:
            raise IntegrityError(f"{checkpoint.uri}/{name} is missing: the checkpoint is not whole") from None
    return out


def newest(run: str) -> tuple[Checkpoint, dict[str, bytes], list[str]] | tuple[None, None, list[str]]:
    """The newest checkpoint that is whole, its parts, and what was passed over and why."""
    found, skipped = complete(run)
    for checkpoint in found:
        try:
            return checkpoint, read(checkpoint), skipped
        except IntegrityError as error:
            skipped.append(str(error))
    return None, None, skipped


def best(found: list[Checkpoint], *, larger_is_better: bool = True) -> Checkpoint | None:
    """The checkpoint with the best metric; the earlier one where two are equal."""
    scored = [c for c in found if c.metric is not None and math.isfinite(c.metric)]
    if not scored:
        return None
    return max(scored, key=lambda c: ((c.metric or 0.0) if larger_is_better else -(c.metric or 0.0), -c.updates))


def collect(run: str, keep: int, *, larger_is_better: bool = True) -> None:
    """Remove what is neither the best nor among the `keep` newest; the manifest goes first."""
    found, _ = complete(run)
    top = best(found, larger_is_better=larger_is_better)
    for checkpoint in found[keep:]:
        if top is None or checkpoint.uri != top.uri:
            storage.delete([storage.join(checkpoint.uri, MANIFEST)])
            storage.delete(storage.join(checkpoint.uri, name) for name in checkpoint.parts)


def pack_optimizer(optimizer: "torch.optim.Optimizer") -> bytes:
    """The tensors of an optimiser's state as safetensors; its settings are in the experiment."""
    import torch
    from safetensors.torch import save as save_tensors

    tensors = {}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{key}"] = value.detach().cpu().contiguous()
    return save_tensors(tensors)


def unpack_optimizer(optimizer: "torch.optim.Optimizer", data: bytes) -> None:
    """Put packed state back into an optimiser that was built the same way."""
    from safetensors.torch import load

    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load(data).items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
