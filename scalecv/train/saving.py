"""What a checkpoint holds, how one is made while training goes on, and how a run goes on from one."""

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from scalecv import storage
from scalecv.artifacts import bundle
from scalecv.batches.pixels import Pixels
from scalecv.config import Experiment
from scalecv.shards.store import Dataset
from scalecv.tasks import TASKS
from scalecv.tasks.task import Task
from scalecv.train import checkpoint
from scalecv.train.job import Job
from scalecv.train.nonfinite import NonFiniteError
from scalecv.train.optim import Progress
from scalecv.train.requests import Requests
from scalecv.train.threshold import fixed
from scalecv.train.writer import Writer, as_optimizer, first_non_finite, on_host

if TYPE_CHECKING:
    from scalecv.train.loop import State

Event = dict[str, Any]


class Saver:
    """Saves the state of a run: rank 0 copies it between two steps, and a thread writes the copy."""

    def __init__(
        self,
        run: str,
        keep: int,
        rank: int,
        about: Callable[["State"], dict[str, Any]],
        requests: Requests,
        moved: Callable[[], None],
        *,
        larger: bool,
    ) -> None:
        """Save one run.

        Args:
            run: URI of the run.
            keep: newest checkpoints that stay besides the best.
            rank: this rank.
            about: the facts of a state's bundle.
            requests: of this rank; told of each checkpoint.
            moved: called while a wait for the writing has hope.
            larger: whether a larger metric is better.
        """
        self.run, self.keep, self.rank, self.about, self.larger = run, keep, rank, about, larger
        self.requests, self.moved = requests, moved
        self.writer, self.news = Writer(), list[Event]()
        self.last = 0
        """Updates at the last checkpoint."""

    def save(self, state: "State", value: float | None) -> None:
        """Copy the state, with the metric that decides, and begin to write it; called on all ranks."""
        began = time.perf_counter()
        self.settle()  # one at a time
        self.requests.saved()
        if self.rank == 0:
            self.writer.start(self._copied(state, value))
        state.recent = [point for point in state.recent if point["step"] > self.last]
        self.last = state.updates
        stalled = {"system/checkpoint_stall_s": time.perf_counter() - began}
        self.news.append({"kind": "metrics", "step": state.updates, "time_ms": now_ms(), "metrics": stalled})

    def settle(self) -> None:
        """Wait until what was saved is written; called on all ranks."""
        self.requests.wait(self.writer.is_done, self.moved)

    def check(self) -> None:
        """Raises what writing a checkpoint has raised."""
        self.writer.is_done()

    def written(self) -> list[Event]:
        """What there is to tell about the checkpoints since the last call."""
        count = len(self.news)
        told, self.news[:count] = self.news[:count], []
        return told

    def _copied(self, state: "State", value: float | None) -> Callable[[], None]:
        """Copy the state; what is returned writes the copy as a checkpoint."""
        facts = self.about(state)
        weights, optimizer = on_host(state.model.state_dict()), on_host(state.optimizer.state_dict())
        told = {**state.to_json(), "ranks": ranks_now(), "threads": torch.get_num_threads()}
        resume, updates = json.dumps(told).encode(), state.updates

        def write() -> None:
            began = time.perf_counter()
            bad = first_non_finite(weights)
            if bad:
                raise NonFiniteError(
                    f"{bad} is not finite after {updates} updates: no checkpoint was written of it. Lower train.lr or "
                    "set train.clip_norm; the same command goes on from the checkpoint before"
                )
            parts = bundle.parts(weights, **facts)
            parts[checkpoint.TENSORS] = checkpoint.pack_optimizer(as_optimizer(optimizer))
            parts[checkpoint.STATE] = resume
            saved = checkpoint.save(self.run, parts, updates, value)
            checkpoint.collect(self.run, self.keep, larger_is_better=self.larger)
            took = {"system/checkpoint_write_s": time.perf_counter() - began}
            self.news.append({"kind": "checkpoint", "uri": storage.without_secrets(saved.uri), "updates": updates})
            self.news.append({"kind": "metrics", "step": updates, "time_ms": now_ms(), "metrics": took})

        return write


def restore(state: "State", parts: dict[str, bytes], rank: int, *, keep_threads: bool = False) -> None:
    """Go on from a checkpoint's parts; the sum over all ranks stays with rank 0.

    Args:
        state: of a network that was built the same way.
        parts: as written.
        rank: this rank.
        keep_threads: whether to compute with as many threads as before where there are as many ranks as before: another
            number rounds otherwise.
    """
    from safetensors.torch import load

    state.model.load_state_dict(load(parts[bundle.WEIGHTS]))
    checkpoint.unpack_optimizer(state.optimizer, parts[checkpoint.TENSORS])
    told = json.loads(parts[checkpoint.STATE])
    state.epoch, state.step, state.updates = told["epoch"], told["step"], told["updates"]
    state.epoch_loss, state.epoch_rows = told["epoch_loss"], told["epoch_rows"]
    state.order_total = int(told["order_total"], 16) if rank == 0 else 0
    state.progress = Progress(**told["progress"])
    state.history, state.recent = told["history"], told["recent"]
    if keep_threads and told.get("ranks") == ranks_now():
        torch.set_num_threads(told["threads"])
    if told["scaler"]:
        state.scaler.load_state_dict(told["scaler"])


def ranks_now() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_0(choose: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What rank 0 finds on storage, told to all ranks without the bytes: they never go on from different places."""
    if not dist.is_initialized():
        return choose()
    mine: tuple[Any, ...] = choose() if dist.get_rank() == 0 else ()
    box: list[Any] = [(mine[0], None, mine[2]) if mine else None]
    dist.broadcast_object_list(box, src=0)
    return mine or tuple(box[0])


def call_of(experiment: Experiment, task: Task, pixels: Pixels) -> bundle.Call:
    """The arguments that build an experiment's network."""
    model = experiment.model
    return bundle.Call(
        arch=model.arch,
        encoder=model.encoder,
        in_channels=model.in_channels or pixels.channels,
        outputs=task.outputs(len(pixels.classes), model.in_channels or pixels.channels),
        stem=model.stem,
        norm=model.norm,
        args=model.args,
    )


def facts_of(
    job: Job, dataset: Dataset, pixels: Pixels, state: "State", upscale: bundle.UpscaleFacts | None
) -> dict[str, Any]:
    """What the bundle of a state says, but for its hashes."""
    experiment = job.experiment
    task = TASKS[experiment.task]
    last = state.history[-1] if state.history else {}
    return {
        "name": experiment.name,
        "task": experiment.task,
        "call": call_of(experiment, task, pixels),
        "pixels": bundle.pixel_facts(pixels),
        "upscale": upscale,
        "classes": pixels.classes,
        "data": bundle.DataFacts(
            uri=storage.without_secrets(dataset.uri),
            version=dataset.version,
            fingerprint=dataset.manifest.fingerprint,
        ),
        "loss": experiment.loss.model_copy(
            update=experiment.loss.terms() or task.default_loss(len(pixels.classes))
        ).model_dump(),
        "metrics": {name: value for name, value in last.items() if name != "epoch"},
        "epoch": state.epoch,
        "threshold": fixed(experiment.train),
    }


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
