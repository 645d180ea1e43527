"""The training loop. It knows torch and the task, and knows no Ray.

Every rank runs it with the same experiment; what is decided, is decided on numbers that were summed
over all ranks, by rank 0. The state of a run is (epoch, step) and what a checkpoint holds; random
numbers of the network (dropout) are a function of (seed, epoch, step, rank; in exact mode the logical shard).
"""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import distributed as dist

from scalecv.batches.collate import to_device
from scalecv.batches.feed import Epoch, Feed
from scalecv.batches.plan import order_sum
from scalecv.config import Experiment
from scalecv.errors import ScalecvError
from scalecv.models.losses import weighted
from scalecv.schema import Batch
from scalecv.tasks.evaluate import Evaluation, evaluate
from scalecv.tasks.task import Task
from scalecv.train import exact, nonfinite
from scalecv.train.meter import Meter
from scalecv.train.optim import Progress, learning_rate
from scalecv.train.requests import Asked, Leaves, Requests, Stopped
from scalecv.train.saving import Saver
from scalecv.train.watchdog import Watchdog

Event = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What does not change during a run, on one rank."""

    experiment: Experiment
    task: Task
    feeds: dict[str, Feed]
    device: torch.device
    rank: int
    ranks: int
    threads: int
    """Threads that this rank's share of the machine is good for; `train.exact` uses a fixed number instead."""
    class_weights: torch.Tensor | None
    metric: str
    """The metric that decides, such as val/accuracy."""
    larger_is_better: bool
    run: str
    """URI of the run."""
    report: Callable[[list[Event]], None]
    """Called equally often on every rank; what rank 0 says is recorded."""
    saver: Saver
    requests: Requests
    watchdog: Watchdog


@dataclass
class State:
    """What changes, and is in every checkpoint."""

    model: torch.nn.Module
    network: torch.nn.Module
    """What is called: the model, in DDP and compiled where asked for."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    updates: int = 0
    order_total: int = 0
    """Sum over all rows seen of SHA-256(epoch, place, id); of this rank since the last gathering."""
    epoch_loss: float = 0.0
    """Sum of the losses of the rows seen in this epoch, over all ranks."""
    epoch_rows: float = 0.0
    progress: Progress = field(default_factory=Progress)
    history: list[dict[str, float]] = field(default_factory=list)
    recent: list[Event] = field(default_factory=list)
    """Points told since the checkpoint before the last: what a driver heard that then died may not be recorded."""

    def to_json(self) -> dict[str, Any]:
        """All but the tensors."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "updates": self.updates,
            "order_total": f"{self.order_total:x}",
            "epoch_loss": self.epoch_loss,
            "epoch_rows": self.epoch_rows,
            "progress": asdict(self.progress),
            "history": self.history,
            "recent": self.recent,
            "scaler": self.scaler.state_dict(),
        }


def fit(setup: Setup, state: State) -> str:
    """Train to the end: "finished", "stopped" (early stopping) or "interrupted" (state saved).

    Raises: Leaves: a process of the run is about to be ended (state saved). NonFiniteError: a gradient is no number.
    """
    train = setup.experiment.train
    upcoming: Epoch | None = None
    try:
        while state.epoch < train.epochs and not state.progress.stops(train):
            current = upcoming or setup.feeds["train"].epoch(state.epoch, state.step)
            upcoming = None
            told = _one_epoch(setup, state, current)
            if state.epoch + 1 < train.epochs:
                upcoming = setup.feeds["train"].epoch(state.epoch + 1)  # its first batches load while we validate
            _close_epoch(setup, state, told)
    except Stopped:
        return "interrupted"
    finally:
        if upcoming:
            upcoming.close()
    return "stopped" if state.progress.stops(train) and state.epoch < train.epochs else "finished"


def _one_epoch(setup: Setup, state: State, batches: Epoch) -> dict[str, float]:
    """Train to the end of an epoch; its numbers."""
    train, track = setup.experiment.train, setup.experiment.track
    steps = batches.plan.steps
    state.network.train()
    meter = Meter(setup, batches, state.step)
    with closing(batches):
        for step, raw in batches:
            is_last = step + 1 == steps
            due = not is_last and track.checkpoint_steps is not None and (step + 1) % track.checkpoint_steps == 0
            setup.requests.begin(save=due)
            torch.manual_seed(_seed(setup, state.epoch, step, setup.rank))
            lr = learning_rate(train, state.epoch * steps + step, steps, state.progress.plateau_scale)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            loss, norm = _update(setup, state, raw, batches.plan.valid_rows(step))
            valid = raw["valid"].numpy()
            ids = [row for row, counts in zip(raw["id"], valid, strict=True) if counts]
            state.order_total += order_sum(raw["position"].numpy()[valid], ids, state.epoch)
            state.step, state.updates = step + 1, state.updates + 1
            meter.add(loss, int(valid.sum()))
            setup.watchdog.tick()
            setup.saver.check()
            asked = setup.requests.end()
            if (step + 1) % track.log_every == 0 or is_last or state.updates == 1:
                meter.tell(state, lr, norm)
            _heed(setup, state, asked, meter)
    return meter.of_epoch(state)


def _heed(setup: Setup, state: State, asked: Asked, meter: Meter | None = None) -> None:
    """Do what is asked of the run; called on all ranks with the same."""
    if asked.save:
        if meter:
            meter.gather(state)
        _save(setup, state, None)
    _obey(setup, asked)


def _obey(setup: Setup, asked: Asked) -> None:
    if asked.stop or asked.leave:
        setup.saver.settle()
        raise Stopped if asked.stop else Leaves


def _save(setup: Setup, state: State, value: float | None) -> None:
    gather_order(state)
    setup.saver.save(state, value)
    setup.watchdog.tick()


def _update(setup: Setup, state: State, raw: Batch, counted: int) -> tuple[torch.Tensor, float]:
    """One update from this rank's share of a global batch; the sum of its losses, and the gradient's norm.

    The loss is divided by the valid rows of the whole global batch, so the result does not depend on how the
    batch is cut into ranks and micro-batches.
    """
    train = setup.experiment.train
    batch = to_device(raw, setup.feeds["train"].pixels, setup.device, train.channels_last)
    terms: nonfinite.Terms = []
    if train.exact:
        total = _exact_gradients(setup, state, batch, counted, terms)
    else:
        total = _backward(setup, state, batch, slice(0, len(raw["id"])), setup.ranks / counted, terms)
    state.scaler.unscale_(state.optimizer)
    limit = train.clip_norm if train.clip_norm is not None else float("inf")
    norm = float(torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit))  # the same on all ranks
    # A scaled fp16 gradient may overflow: the scaler skips that update. A loss that is not finite is an error anyway.
    if not math.isfinite(norm) and not (state.scaler.is_enabled() and nonfinite.is_finite_everywhere(total)):
        at = {"epoch": state.epoch, "step": state.step, "updates": state.updates}
        nonfinite.stop(setup.run, setup.rank, at, norm, raw["id"], raw["valid"].tolist(), terms)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if train.exact and state.updates == 0:
        _tell_cost(setup, state, batch, counted)
    return total, norm


def _exact_gradients(
    setup: Setup, state: State, batch: dict[str, Any], counted: int, terms: nonfinite.Terms
) -> torch.Tensor:
    def backward(part: slice, shard: int) -> torch.Tensor:
        torch.manual_seed(_seed(setup, state.epoch, state.step, shard))
        return _backward(setup, state, batch, part, 1 / counted, terms)

    return exact.gradients(state.model, len(batch["valid"]), setup.rank, setup.ranks, backward)


def _tell_cost(setup: Setup, state: State, batch: dict[str, Any], counted: int) -> None:
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
    setup: Setup, state: State, batch: dict[str, Any], rows: slice, scale: float, told: nonfinite.Terms
) -> torch.Tensor:
    """Add the gradient of some rows, micro-batch by micro-batch; the sum of their losses, and their terms in `told`."""
    experiment, size = setup.experiment, setup.experiment.train.micro_batch or rows.stop - rows.start
    weights = experiment.loss.terms() or setup.task.default_loss(len(setup.feeds["train"].pixels.classes))
    total = torch.zeros((), device=setup.device)
    for first in range(rows.start, rows.stop, size):
        micro = {k: v[first : min(first + size, rows.stop)] for k, v in batch.items()}
        with _no_sync(state.network, last=first + size >= rows.stop):
            with _autocast(setup):
                logits = state.network(micro["image"])
            terms = setup.task.losses(logits.float(), micro, experiment.loss, setup.class_weights)
            loss = (weighted(terms, weights) * micro["valid"]).sum()
            state.scaler.scale(loss * scale).backward()
        total += loss.detach()
        told.append({name: values.detach() for name, values in terms.items()})
    return total


def _no_sync(network: torch.nn.Module, *, last: bool) -> Any:
    """DDP adds up gradients over ranks with the last micro-batch only."""
    return network.no_sync() if not last and hasattr(network, "no_sync") else nullcontext()  # type: ignore[operator]


def _close_epoch(setup: Setup, state: State, told: dict[str, float]) -> None:
    """Validate, decide, save and report."""
    train = setup.experiment.train
    began = time.perf_counter()
    scores = dict(told)
    _same_buffers(state.model)
    if "val" in setup.feeds:

        def each() -> None:
            _heed(setup, state, _heard(setup))

        checked = validate(setup, state.model, "val", each)
        scores |= summary(setup, checked, "val")
    scores["time/validation_s"] = time.perf_counter() - began
    value = scores.get(setup.metric)
    if value is None:
        known = ", ".join(sorted(k for k in scores if k.startswith(("val/", "train/"))))
        raise ScalecvError(f"train.metric={setup.metric} is not among what this run measures: {known}")
    progress = state.progress.after(value, state.epoch, train, larger_is_better=setup.larger_is_better)
    state.progress = _from_rank_0(progress)
    state.epoch, state.step = state.epoch + 1, 0
    state.epoch_loss, state.epoch_rows = 0.0, 0.0
    state.history.append({"epoch": float(state.epoch), **scores})
    point = {"kind": "metrics", "step": state.updates, "time_ms": int(time.time() * 1000), "metrics": scores}
    state.recent.append(point)
    _save(setup, state, value)
    took = scores["time/train_s"] + scores["time/validation_s"]
    line = {
        "kind": "progress",
        "epoch": state.epoch,
        "epochs": train.epochs,
        "metrics": scores,
        "is_epoch_end": True,
        "left_s": took * (train.epochs - state.epoch),
    }
    setup.report([point, line, *setup.saver.written()])


def _heard(setup: Setup) -> Asked:
    """What all ranks were asked for, between two batches of a validation."""
    setup.watchdog.tick()
    setup.requests.begin()
    return setup.requests.end()


def obey(setup: Setup) -> None:
    """End the run if that was asked for and all of it is saved already; called on all ranks.

    Raises: Stopped, Leaves: it was.
    """
    _obey(setup, _heard(setup))


def _same_buffers(model: torch.nn.Module) -> None:
    """Give every rank rank 0's running statistics: they are what a checkpoint holds, so they are what is scored."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def validate(
    setup: Setup, model: torch.nn.Module, split: str, each: Callable[[], None], pictures: int = 0
) -> Evaluation:
    """Score a split with the loss and precision of the run; `each` is called after each batch, on all ranks."""
    with _autocast(setup):
        return evaluate(
            model,
            setup.task,
            setup.feeds[split],
            setup.device,
            loss=setup.experiment.loss,
            class_weights=setup.class_weights,
            channels_last=setup.experiment.train.channels_last,
            pictures=pictures,
            each=each,
        )


def summary(setup: Setup, checked: Evaluation, split: str) -> dict[str, float]:
    """An evaluation as named numbers."""
    named = setup.task.summarise(checked.sums, setup.feeds["train"].pixels.classes)
    loss = float(checked.sums["loss"].item()) / max(1, checked.rows)
    return {f"{split}/{name}": value for name, value in {"loss": loss, **named}.items()}


def gather_order(state: State) -> None:
    """Add up the order sums of all ranks; rank 0 keeps the total."""
    if not dist.is_initialized():
        state.order_total %= 1 << 256
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, state.order_total)
    state.order_total = sum(everyone) % (1 << 256) if dist.get_rank() == 0 else 0


def _autocast(setup: Setup) -> Any:
    precision = setup.experiment.train.precision
    if precision == "fp32" or (precision == "fp16" and setup.device.type == "cpu"):
        return nullcontext()
    return torch.autocast(setup.device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def _seed(setup: Setup, epoch: int, step: int, part: int) -> int:
    key = f"{setup.experiment.seed}|{epoch}|{step}|{part}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def _from_rank_0(value: Progress) -> Progress:
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
