"""The training loop. It knows torch and the task, and knows no Ray.

Every rank runs it with the same experiment; what is decided, is decided on numbers that were summed
over all ranks, by rank 0. The state of a run is (epoch, step) and what a checkpoint holds; random
numbers of the network (dropout) are a function of (seed, epoch, step, rank; in exact mode the logical shard).
"""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
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
from scalecv.train import exact
from scalecv.train.optim import Progress, learning_rate

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
    class_weights: torch.Tensor | None
    metric: str
    """The metric that decides, such as val/accuracy."""
    larger_is_better: bool
    report: Callable[[list[Event]], None]
    """Called equally often on every rank; what rank 0 says is recorded."""
    save: Callable[["State", float | None], None]
    """Write a checkpoint (rank 0 writes, all wait)."""
    stop_requested: Callable[[], bool]
    """Asked on rank 0 only."""


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
            "scaler": self.scaler.state_dict(),
        }


class NonFiniteError(ScalecvError):
    """The gradient is not a finite number; the weights were not updated."""


def fit(setup: Setup, state: State) -> str:
    """Train to the end: "finished", "stopped" (early stopping) or "interrupted" (state saved)."""
    train = setup.experiment.train
    upcoming: Epoch | None = None
    try:
        while state.epoch < train.epochs and not state.progress.stops(train):
            current = upcoming or setup.feeds["train"].epoch(state.epoch, state.step)
            upcoming = None
            told, stop = _one_epoch(setup, state, current)
            if told is None:
                gather_order(state)
                setup.save(state, None)
                return "interrupted"
            if state.epoch + 1 < train.epochs and not stop:
                upcoming = setup.feeds["train"].epoch(state.epoch + 1)  # its first batches load while we validate
            _close_epoch(setup, state, told)
            if stop and state.epoch < train.epochs:
                return "interrupted"
    finally:
        if upcoming:
            upcoming.close()
    return "stopped" if state.progress.stops(train) and state.epoch < train.epochs else "finished"


def _one_epoch(setup: Setup, state: State, batches: Epoch) -> tuple[dict[str, float] | None, bool]:
    """Train to the end of an epoch; its numbers (None if it did not get there), and whether a stop was asked for."""
    train, every = setup.experiment.train, setup.experiment.track.log_every
    plan = batches.plan
    state.network.train()
    meter, stop = _Meter(setup, plan.steps, state.step), False
    for step, raw in batches:
        torch.manual_seed(_seed(setup, state.epoch, step, setup.rank))
        lr = learning_rate(train, state.epoch * plan.steps + step, plan.steps, state.progress.plateau_scale)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        loss, norm = _update(setup, state, raw, plan.valid_rows(step))
        valid = raw["valid"].numpy()
        ids = [row for row, counts in zip(raw["id"], valid, strict=True) if counts]
        state.order_total += order_sum(raw["position"].numpy()[valid], ids, state.epoch)
        state.step, state.updates = step + 1, state.updates + 1
        meter.add(loss, int(valid.sum()))
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            stop = meter.tell(state, batches.wait_s, lr, norm, setup.stop_requested)
            if stop and step + 1 < plan.steps:
                batches.close()
                return None, True
    return meter.of_epoch(state), stop


def _update(setup: Setup, state: State, raw: Batch, counted: int) -> tuple[torch.Tensor, float]:
    """One update from this rank's share of a global batch; the sum of its losses, and the gradient's norm.

    The loss is divided by the valid rows of the whole global batch, so the result does not depend on how the
    batch is cut into ranks and micro-batches.
    """
    train = setup.experiment.train
    batch = to_device(raw, setup.feeds["train"].pixels, setup.device, train.channels_last)
    rows = len(raw["id"])
    if train.exact:

        def backward(part: slice, shard: int) -> torch.Tensor:
            torch.manual_seed(_seed(setup, state.epoch, state.step, shard))
            return _backward(setup, state, batch, part, 1 / counted)

        total = exact.gradients(state.model, rows, setup.rank, setup.ranks, backward)
    else:
        total = _backward(setup, state, batch, slice(0, rows), setup.ranks / counted)
    state.scaler.unscale_(state.optimizer)
    limit = train.clip_norm if train.clip_norm is not None else float("inf")
    norm = float(torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit))
    # A scaled fp16 gradient may overflow: the scaler skips that update. A loss that is not finite is an error anyway.
    if not math.isfinite(norm) and (not state.scaler.is_enabled() or not math.isfinite(float(total))):
        raise NonFiniteError(
            f"the gradient is {norm} at epoch {state.epoch + 1}, step {state.step + 1}: the weights were not updated. "
            f"Lower train.lr, set train.clip_norm, or look at the rows {', '.join(raw['id'][:4])} …"
        )
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return total, norm


def _backward(setup: Setup, state: State, batch: dict[str, Any], rows: slice, scale: float) -> torch.Tensor:
    """Add the gradient of some rows, micro-batch by micro-batch; the sum of their losses."""
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
        checked = validate(setup, state.model, "val")
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
    gather_order(state)
    setup.save(state, value)
    now = int(time.time() * 1000)
    took = scores["time/train_s"] + scores["time/validation_s"]
    line = {
        "kind": "progress",
        "epoch": state.epoch,
        "epochs": train.epochs,
        "metrics": scores,
        "is_epoch_end": True,
        "left_s": took * (train.epochs - state.epoch),
    }
    setup.report([{"kind": "metrics", "step": state.updates, "time_ms": now, "metrics": scores}, line])


def _same_buffers(model: torch.nn.Module) -> None:
    """Give every rank rank 0's running statistics: they are what a checkpoint holds, so they are what is scored."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def validate(setup: Setup, model: torch.nn.Module, split: str, pictures: int = 0) -> Evaluation:
    """Score a split with the loss and precision of the run."""
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


class _Meter:
    """Loss, speed and waiting since the last point; one host sync and one all-reduce for each point."""

    def __init__(self, setup: Setup, steps: int, start: int) -> None:
        self.setup, self.steps, self.told_step = setup, steps, start
        self.began = self.last = time.perf_counter()
        self.loss = torch.zeros((), device=setup.device)
        self.rows = 0
        self.rows_seen, self.wait_s, self.last_wait_s = 0.0, 0.0, 0.0

    def add(self, loss: torch.Tensor, rows: int) -> None:
        self.loss += loss
        self.rows += rows

    def tell(self, state: State, wait_s: float, lr: float, norm: float, stop: Callable[[], bool]) -> bool:
        """Report a point; whether a stop was asked for."""
        now = time.perf_counter()
        asked = self.setup.rank == 0 and stop()
        sums = torch.tensor([0.0, self.rows, wait_s - self.last_wait_s, float(asked)], dtype=torch.float64)
        sums[0] = self.loss.item()
        if dist.is_initialized():
            sums = sums.to(self.setup.device)
            dist.all_reduce(sums)
        loss, rows, waited, stops = sums.tolist()
        took, self.last, self.last_wait_s = now - self.last, now, wait_s
        self.rows_seen, self.wait_s = self.rows_seen + rows, self.wait_s + waited
        state.epoch_loss, state.epoch_rows = state.epoch_loss + loss, state.epoch_rows + rows
        self.loss, self.rows = torch.zeros_like(self.loss), 0
        speed = rows / max(took, 1e-9)
        share = waited / self.setup.ranks / max(took, 1e-9)
        point = {
            "train/batch_loss": loss / max(1.0, rows),
            "train/lr": lr,
            "train/grad_norm": norm,
            "system/images_per_s": speed,
            "system/data_wait_share": share,
        }
        if self.setup.device.type == "cuda":
            point["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.setup.report(
            [
                {"kind": "metrics", "step": state.updates, "time_ms": int(time.time() * 1000), "metrics": point},
                {
                    "kind": "progress",
                    "epoch": state.epoch + 1,
                    "epochs": self.setup.experiment.train.epochs,
                    "step": state.step,
                    "steps": self.steps,
                    "metrics": point,
                    "left_s": self._left_s(state, took),
                },
            ]
        )
        return bool(stops > 0)

    def _left_s(self, state: State, took: float) -> float:
        """Seconds to the end of the run at the speed since the last point, validation left out."""
        done = state.step - self.told_step
        self.told_step = state.step
        steps_left = self.steps - state.step + (self.setup.experiment.train.epochs - state.epoch - 1) * self.steps
        return took / max(1, done) * steps_left

    def of_epoch(self, state: State) -> dict[str, float]:
        """The epoch's loss over all its rows, and speed and waiting since this process began with it."""
        took = time.perf_counter() - self.began
        return {
            "train/loss": state.epoch_loss / max(1.0, state.epoch_rows),
            "time/train_s": took,
            "system/epoch_images_per_s": self.rows_seen / max(took, 1e-9),
            "system/epoch_data_wait_share": self.wait_s / self.setup.ranks / max(took, 1e-9),
        }


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
