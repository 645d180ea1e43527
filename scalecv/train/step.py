"""One update from this rank's share of a global batch, in micro-batches."""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from scalecv.batches.collate import to_device
from scalecv.models import enlarged
from scalecv.models.losses import weighted
from scalecv.schema import Batch
from scalecv.train import exact, micro_batch, nonfinite
from scalecv.train.optim import match_layouts
from scalecv.train.times import Times

if TYPE_CHECKING:
    from scalecv.train.loop import Setup, State


def update(
    setup: "Setup", state: "State", raw: Batch, counted: int, times: Times | None = None
) -> tuple[torch.Tensor, float]:
    """One update; the sum of this rank's losses, and the gradient's norm.

    The loss is divided by the valid rows of the whole global batch, so the result does not depend on how the
    batch is cut into ranks and micro-batches. Where memory runs out, no gradient of the try stays: see micro_batch.

    Args:
        setup: of this rank.
        state: changed in place.
        raw: this rank's rows.
        counted: valid rows of the global batch.
        times: told what took how long.
    Raises: NonFiniteError: the gradient is no number. OutOfMemory: no smaller micro-batch is left.
    """
    train = setup.experiment.train
    times = times or Times(setup.device, state.model, 1)
    times.start()
    batch = setup.task.prepare(to_device(raw, setup.feeds["train"].pixels, setup.device, train.channels_last))
    times.lap("transfer")
    if not state.micro_batch:
        micro_batch.find(setup, state, lambda size: _try_out(setup, state, batch, size))
        times.start()

    def gradients() -> tuple[torch.Tensor, nonfinite.Terms]:
        terms: nonfinite.Terms = []
        _draw_from(setup, seed(setup, state.epoch, state.step, setup.rank))
        if train.exact:
            return _exact_gradients(setup, state, batch, counted, terms), terms
        return _backward(setup, state, batch, slice(0, len(raw["id"])), setup.ranks / counted, terms), terms

    total, terms = micro_batch.fitting(setup, state, gradients)
    times.computed()
    state.scaler.unscale_(state.optimizer)
    limit = train.clip_norm if train.clip_norm is not None else float("inf")
    norm = float(torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit))  # the same on all ranks
    # A scaled fp16 gradient may overflow: the scaler skips that update. A loss that is not finite is an error anyway.
    if not math.isfinite(norm) and not (state.scaler.is_enabled() and nonfinite.is_finite_everywhere(total)):
        at = {"epoch": state.epoch, "step": state.step, "updates": state.updates}
        nonfinite.stop(setup.run, setup.rank, at, norm, raw["id"], raw["valid"].tolist(), terms)
    match_layouts(state.optimizer)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    times.lap("optimizer")
    if train.exact and state.updates == 0:
        _tell_cost(setup, state, batch, counted)
    return total, norm


def autocast(setup: "Setup") -> Any:
    """The precision of the run, as a context."""
    precision = setup.experiment.train.precision
    if precision == "fp32" or (precision == "fp16" and setup.device.type == "cpu"):
        return nullcontext()
    return torch.autocast(setup.device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def seed(setup: "Setup", epoch: int, step: int, part: int) -> int:
    """What the network's random numbers of a step begin with."""
    key = f"{setup.experiment.seed}|{epoch}|{step}|{part}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def _draw_from(setup: "Setup", number: int) -> None:
    """Set what the network's random numbers begin with, on the devices that it uses.

    On a CPU alone: `torch.manual_seed` writes down the stack for a GPU that may come later, which takes 0.4 ms.
    """
    if setup.device.type == "cpu":
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


def _exact_gradients(
    setup: "Setup", state: "State", batch: dict[str, Any], counted: int, terms: nonfinite.Terms
) -> torch.Tensor:
    def backward(part: slice, shard: int) -> torch.Tensor:
        _draw_from(setup, seed(setup, state.epoch, state.step, shard))
        return _backward(setup, state, batch, part, 1 / counted, terms)

    return exact.gradients(state.model, len(batch["valid"]), setup.rank, setup.ranks, backward)


def _tell_cost(setup: "Setup", state: "State", batch: dict[str, Any], counted: int) -> None:
    """Say what `train.exact` costs, on a batch whose gradients are then thrown away; called on all ranks."""
    rows = slice(0, len(batch["valid"]))
    took, plain = exact.cost(
        state.model,
        lambda: _exact_gradients(setup, state, batch, counted, []),
        lambda: _backward(setup, state, batch, rows, 1 / counted, []),
        setup.threads,
    )
    said = f"train.exact=true: the gradients of a batch take {took:.3g} s, without it {plain:.3g} s"
    times = {"time/exact_gradients_s": took, "time/plain_gradients_s": plain}
    point = {"kind": "metrics", "step": 1, "time_ms": int(time.time() * 1000), "metrics": times}
    setup.report([point, {"kind": "progress", "message": f"{said} ({took / plain:.2f} times as long)"}])


def _backward(
    setup: "Setup", state: "State", batch: dict[str, Any], rows: slice, scale: float, told: nonfinite.Terms
) -> torch.Tensor:
    """Add the gradient of some rows, micro-batch by micro-batch; the sum of their losses, and their terms in `told`."""
    total = torch.zeros((), device=setup.device)
    for part in micro_batch.parts(rows, state.micro_batch):
        with _no_sync(state.network, last=part.stop == rows.stop):
            total += _of_part(setup, state, state.network, batch, part, scale, told)
    return total


def _of_part(
    setup: "Setup",
    state: "State",
    network: Callable[[torch.Tensor], torch.Tensor],
    batch: dict[str, Any],
    part: slice,
    scale: float,
    told: nonfinite.Terms,
) -> torch.Tensor:
    """Add the gradient of one micro-batch; the sum of its losses."""
    weights = setup.experiment.loss.terms() or setup.task.default_loss(len(setup.feeds["train"].pixels.classes))
    micro = {key: values[part] for key, values in batch.items()}
    with autocast(setup):
        logits = network(micro["image"])
    micro = enlarged.truth(micro, setup.experiment.upscale.factor)
    terms = setup.task.losses(logits.float(), micro, setup.experiment.loss, setup.class_weights)
    loss: torch.Tensor = (weighted(terms, weights) * micro["valid"]).sum()
    scaled: torch.Tensor = state.scaler.scale(loss * scale)
    scaled.backward()  # type: ignore[no-untyped-call]
    told.append({name: values.detach() for name, values in terms.items()})
    return loss.detach()


def _try_out(setup: "Setup", state: "State", batch: dict[str, Any], size: int) -> None:
    """Gradients of two micro-batches, for what they need of memory; without the other ranks."""
    rows = len(batch["valid"])
    for first in range(0, min(rows, 2 * size), size):
        _of_part(setup, state, state.model, batch, slice(first, min(rows, first + size)), 1.0, [])


def _no_sync(network: torch.nn.Module, *, last: bool) -> Any:
    """DDP adds up gradients over ranks with the last micro-batch only."""
    return network.no_sync() if not last and hasattr(network, "no_sync") else nullcontext()  # type: ignore[operator]
