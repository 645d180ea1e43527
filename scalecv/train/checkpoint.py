"""A checkpoint = a bundle plus what training needs to go on; complete when its manifest is there and fits.

    RUN/checkpoints/00000120-1f6e2c0a/
        model.safetensors bundle.json       usable as a bundle by itself
        resume.safetensors resume.json      optimiser tensors; position, scheduler, scaler, history
        manifest.json                       written last: size and SHA-256 of each part

The folder's name holds the number of updates and the first digits of the manifest's own SHA-256, so nothing is ever
written over, and no bit of a manifest or a part can change unnoticed. Which checkpoint is the newest is decided by
these manifests alone.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalecv import storage
from scalecv.errors import DataError, IntegrityError

if TYPE_CHECKING:
    import torch

FORMAT = 3
"""It changes with what a checkpoint holds, and with the planned order: its position would mean other rows."""
MANIFEST = "manifest.json"
STATE = "resume.json"
TENSORS = "resume.safetensors"
NAME = re.compile(r"^\d{8}-[0-9a-f]{8}$")
PART = re.compile(r"^\w[\w.-]*$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on storage."""

    uri: str
    updates: int
    metric: float | None
    parts: dict[str, Any]


def save(run: str, parts: dict[str, bytes], updates: int, metric: float | None) -> Checkpoint:
    """Write a checkpoint: the parts first, the manifest last.

    Raises: StorageError: no space, or no answer; then the checkpoint does not count, and those before it are as
        they were.
    """
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)} for name, data in parts.items()}
    manifest = {"format": FORMAT, "updates": updates, "metric": metric, "parts": sums}
    encoded = json.dumps(manifest, indent=1).encode()
    uri = storage.join(_folder(run), f"{updates:08d}-{_tag(encoded)}")
    for name, data in parts.items():
        storage.put(storage.join(uri, name), data)
    storage.put(storage.join(uri, MANIFEST), encoded)
    return Checkpoint(uri, updates, metric, sums)


def complete(run: str) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints whose manifest is there and as it was written, newest first; what was passed over and why.

    Raises: DataError: a checkpoint in the format of another release.
    """
    found, skipped = [], []
    for name in _names(run):
        uri = storage.join(_folder(run), name)
        try:
            data = storage.get(storage.join(uri, MANIFEST))
        except FileNotFoundError:
            skipped.append(f"{uri}: not complete (no manifest)")
            continue
        manifest, is_whole = _decoded(data), _tag(data) == name.partition("-")[2]
        if manifest.get("format") == 1 or (is_whole and manifest.get("format") != FORMAT):
            raise DataError(
                f"{uri} has checkpoint format {manifest.get('format')}, this scalecv reads {FORMAT}: "
                "go on with the scalecv that wrote it, or start over with --new"
            )
        if is_whole and _is_well_formed(manifest):
            found.append(Checkpoint(uri, manifest["updates"], manifest["metric"], manifest["parts"]))
        else:
            skipped.append(f"{uri}: its manifest is damaged")
    # After the last step of an epoch there may be two: the one with a metric has the validation behind it.
    found.sort(key=lambda one: (one.updates, one.metric is not None), reverse=True)
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


def history(run: str) -> list[dict[str, float]]:
    """The numbers of each epoch that is done, as the newest checkpoint knows them; weights are not read."""
    for checkpoint in complete(run)[0]:
        told = checkpoint.parts[STATE]
        try:
            state = json.loads(storage.get(storage.join(checkpoint.uri, STATE), told["size_bytes"], told["sha256"]))
        except (FileNotFoundError, IntegrityError):
            continue
        return list(state["history"])
    return []


def best(found: list[Checkpoint], *, larger_is_better: bool = True) -> Checkpoint | None:
    """The checkpoint with the best metric; the earlier one where two are equal."""
    scored = [c for c in found if c.metric is not None and math.isfinite(c.metric)]
    if not scored:
        return None
    return max(scored, key=lambda c: ((c.metric or 0.0) if larger_is_better else -(c.metric or 0.0), -c.updates))


def collect(run: str, keep: int, *, larger_is_better: bool = True) -> None:
    """Remove what is neither the best nor among the `keep` newest, and what crashed or damaged ones left behind.

    A folder that counts for more updates than the newest complete checkpoint may be about to become one, so it
    stays. Of a checkpoint that goes, the manifest goes first: a crash in between leaves nothing that counts.
    """
    found, _ = complete(run)
    if not found:
        return
    top = best(found, larger_is_better=larger_is_better)
    kept = {checkpoint.uri: [MANIFEST, *checkpoint.parts] for checkpoint in [*found[:keep], *([top] if top else [])]}
    for name in _names(run):
        uri = storage.join(_folder(run), name)
        if int(name.partition("-")[0]) <= found[0].updates:
            known = kept.get(uri, [])
            if not known:
                storage.delete([storage.join(uri, MANIFEST)])
            storage.delete([storage.join(uri, part) for part in storage.list_names(uri) if part not in known])


def _folder(run: str) -> str:
    return storage.join(run, "checkpoints")


def _names(run: str) -> list[str]:
    """Folders of checkpoints, complete or not, newest first."""
    return sorted(filter(NAME.match, storage.list_names(_folder(run))), reverse=True)


def _tag(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:8]


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_well_formed(manifest: dict[str, Any]) -> bool:
    """Whether the types are ours, and every part lies in the checkpoint's own folder."""
    updates, metric, parts = (manifest.get(key) for key in ("updates", "metric", "parts"))
    return (
        isinstance(updates, int)
        and (metric is None or isinstance(metric, int | float))
        and isinstance(parts, dict)
        and all(PART.match(name) and isinstance(told, dict) for name, told in parts.items())
        and all(
            isinstance(told.get("sha256"), str) and isinstance(told.get("size_bytes"), int) for told in parts.values()
        )
    )


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
    import torch
    from safetensors.torch import load

    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load(data).items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if getattr(value, "shape", None) == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # channels_last
