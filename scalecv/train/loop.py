"""The training loop. It knows torch and the task, and knows no Ray.

Every rank runs it with the same experiment; what is decided, is decided on numbers that were summed
over all ranks, by rank 0. The state of a run is (epoch, step) and what a checkpoint holds; random
numbers of the network (dropout) are a function of (seed, epoch, step, rank; in exact mode the logical shard).
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from scalecv.artifacts.bundle import UpscaleFacts
from scalecv.batches.epoch import Epoch
from scalecv.batches.feed import Feed
from scalecv.batches.plan import order_sum
from scalecv.config import Experiment
from scalecv.errors import ScalecvError
from scalecv.tasks.evaluate import Evaluation, evaluate, gather
from scalecv.tasks.rows import RowSums
from scalecv.tasks.task import Task
from scalecv.train import micro_batch, threshold
from scalecv.train.gallery import Gallery
from scalecv.train.job import Pause, epoch_s
from scalecv.train.meter import Meter
from scalecv.train.optim import Progress, learning_rate, set_rate
from scalecv.train.requests import Asked, Leaves, Requests, Stopped
from scalecv.train.saving import Saver
from scalecv.train.step import autocast, update
from scalecv.train.times import Times
from scalecv.train.watchdog import Watchdog

Event = dict[str, Any]
T = TypeVar("T")


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
    gallery: Gallery
    upscale: UpscaleFacts | None = None
    """The stage before the network, where there is one."""
    until: Pause | None = None
    """Where the run pauses."""


@dataclass
class State:
    """What changes, and is in every checkpoint."""

    model: torch.nn.Module
    network: torch.nn.Module
    """What is called: the model, in DDP and compiled where asked for."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro_batch: int = 0
    """Images of this rank that go through the network at once; 0 while it is not known (see micro_batch)."""
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
    """Train to the end: "finished", "stopped" (early stopping) or "interrupted" (asked to, or paused; state saved).

    Raises: Leaves: a process of the run is about to be ended (state saved), or is out of memory. NonFiniteError: a
        gradient is no number. OutOfMemory: no micro-batch is small enough.
    """
    train = setup.experiment.train
    micro_batch.start(setup, state)
    try:
        with setup.feeds["train"].epochs(state.epoch, state.step, _last(setup)) as epochs:
            while state.epoch < train.epochs and not state.progress.stops(train) and not _pauses(setup, state):
                told = _one_epoch(setup, state, next(epochs))
                _close_epoch(setup, state, told)
    except Stopped:
        return "interrupted"
    if state.epoch >= train.epochs:
        return "finished"
    if state.progress.stops(train):
        return "stopped"
    setup.saver.settle()
    return "interrupted"


def _last(setup: Setup) -> int:
    """Epochs at whose end nothing is read ahead of."""
    epochs, until = setup.experiment.train.epochs, setup.until
    return epochs if until is None or until.in_device_s else min(epochs, math.ceil(until.at))


def _pauses(setup: Setup, state: State) -> bool:
    """Whether the run is to pause; ranks decide alike, their clocks do not count."""
    return setup.until is not None and _from_rank_0(setup.until.comes(state.history, setup.ranks))


def _one_epoch(setup: Setup, state: State, batches: Epoch) -> dict[str, float]:
    """Train to the end of an epoch; its numbers."""
    train, track = setup.experiment.train, setup.experiment.track
    steps = batches.plan.steps
    state.network.train()
    times = Times(setup.device, state.model, setup.ranks)
    meter = Meter(setup, batches, state.step, times)
    with closing(batches), closing(times):
        for step, raw in batches:
            is_last = step + 1 == steps
            due = not is_last and track.checkpoint_steps is not None and (step + 1) % track.checkpoint_steps == 0
            setup.requests.begin(save=due)
            lr = learning_rate(train, state.epoch * steps + step, steps, state.progress.plateau_scale)
            set_rate(state.optimizer, lr)
            loss, norm = update(setup, state, raw, batches.plan.valid_rows(step), times)
            valid = raw["valid"].numpy()
            ids = [row for row, counts in zip(raw["id"], valid, strict=True) if counts]
            state.order_total += order_sum(raw["position"].numpy()[valid], ids, state.epoch)
            state.step, state.updates = step + 1, state.updates + 1
            meter.add(loss, int(valid.sum()))
            setup.watchdog.tick()
            setup.saver.check()
            began = time.perf_counter()
            asked = setup.requests.end()
            times.add("sync", time.perf_counter() - began)
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


def _close_epoch(setup: Setup, state: State, told: dict[str, float]) -> None:
    """Validate, decide, save and report."""
    train = setup.experiment.train
    began = time.perf_counter()
    scores = dict(told)
    _same_buffers(state.model)
    if "val" in setup.feeds:

        def each() -> None:
            _heed(setup, state, _heard(setup))

        kept = setup.gallery.samples(state.epoch)
        checked = validate(setup, state.model, "val", each, pictures=kept, size=state.micro_batch)
        tuned = threshold.chosen(train, setup.task, checked)
        if tuned != threshold.fixed(train):
            scores[threshold.TUNED] = tuned
        checked = checked.at(threshold.fixed(train))
        if kept:
            classes = setup.feeds["val"].pixels.classes
            setup.gallery.show(setup.task, gather(checked, kept), classes, state.updates)
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
    line = {
        "kind": "progress",
        "epoch": state.epoch,
        "epochs": train.epochs,
        "metrics": scores,
        "is_epoch_end": True,
        "left_s": epoch_s(scores) * (train.epochs - state.epoch),
    }
    setup.report([point, line, *setup.saver.written(), *setup.gallery.drawn()])


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
    setup: Setup,
    model: torch.nn.Module,
    split: str,
    each: Callable[[], None],
    pictures: int = 0,
    size: int = 0,
    rows: RowSums | None = None,
) -> Evaluation:
    """Score a split with the loss and precision of the run.

    Args:
        setup: of this rank.
        model: what is scored.
        split: of the dataset.
        each: called after each batch, on all ranks.
        pictures: samples to keep.
        size: most rows that go through at once; 0 means a whole batch.
        rows: where what each row adds to the metrics is kept.
    """
    with autocast(setup):
        return evaluate(
            micro_batch.InParts(model, size),
            setup.task,
            setup.feeds[split],
            setup.device,
            loss=setup.experiment.loss,
            class_weights=setup.class_weights,
            channels_last=setup.experiment.train.channels_last,
            pictures=pictures,
            rows=rows,
            each=each,
        )


def summary(setup: Setup, checked: Evaluation, split: str) -> dict[str, float]:
    """An evaluation as named numbers, the headline first."""
    named = setup.task.summarise(checked.sums, setup.feeds["train"].pixels.classes, checked.threshold)
    loss = float(checked.sums["loss"].item()) / max(1, checked.rows)
    return {f"{split}/{name}": value for name, value in {**named, "loss": loss}.items()}


def gather_order(state: State) -> None:
    """Add up the order sums of all ranks; rank 0 keeps the total."""
    if not dist.is_initialized():
        state.order_total %= 1 << 256
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, state.order_total)
    state.order_total = sum(everyone) % (1 << 256) if dist.get_rank() == 0 else 0


def _from_rank_0(value: T) -> T:
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
