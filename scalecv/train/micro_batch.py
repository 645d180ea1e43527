"""How many images of a rank go through the network at once: its whole share of a batch, or less where memory is short.

`train.micro_batch: auto` tries gradients of the first batch on every rank before the first update, with room held for
the optimiser's state: all of the share, half of it, and so on; the ranks take the smallest of what fits. On a CPU,
where no error comes before the system ends the process, the growth of the process in a small try is put against the
memory that is left. The number is kept in RUN/micro_batch.json, so a run that goes on cuts its batches as before.

Memory that runs out later: a rank that is alone throws the gradients of that step away and repeats it in halves.
Among several ranks the others wait in a collective by then; so half is kept in RUN/micro_batch.json, the rank leaves,
and the workers are started again from the last checkpoint.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist

from scalecv import storage
from scalecv.errors import ScalecvError
from scalecv.models.norms import alone
from scalecv.train.checks import SHARDS
from scalecv.train.memory import free_bytes, growth
from scalecv.train.requests import Leaves
from scalecv.train.saving import from_rank_0

if TYPE_CHECKING:
    from scalecv.train.loop import Setup, State

T = TypeVar("T")
FILE = "micro_batch.json"
SAFE = 0.8
"""Share of the free memory that a CPU's gradients may take: data that is read ahead needs some too."""
TELLING = 0.05
"""Share of the free memory from which on a measured growth is taken to be proportional to the images."""
WORDS = ("can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
"""What else is said where memory runs out, besides torch.OutOfMemoryError."""


class OutOfMemory(ScalecvError):
    """The gradient of the smallest micro-batch does not fit into memory."""


def parts(rows: slice, size: int) -> list[slice]:
    """Rows in as few parts as possible of at most `size`, as even as possible; one part if `size` is 0."""
    count = rows.stop - rows.start
    cuts = math.ceil(count / (size or count))
    ends = [rows.start + count * part // cuts for part in range(cuts + 1)]
    return [slice(ends[part], ends[part + 1]) for part in range(cuts)]


def sizes(rows: int, smallest: int) -> list[int]:
    """What may be tried: all rows, half of them, and so on while each part has at least `smallest`."""
    found = [rows]
    while found[-1] > 1:
        size = math.ceil(found[-1] / 2)
        if rows // math.ceil(rows / size) < smallest:
            break
        found.append(size)
    return found


def start(setup: "Setup", state: "State") -> None:
    """Take the size that is set, or the one that this run has found before; called on all ranks."""
    wanted = setup.experiment.train.micro_batch
    if wanted is None:
        state.micro_batch = setup.experiment.train.batch // setup.ranks
    elif wanted != "auto":
        state.micro_batch = wanted
    else:
        state.micro_batch = from_rank_0(lambda: (_kept(setup), None, None))[0]


def find(setup: "Setup", state: "State", try_out: Callable[[int], None]) -> None:
    """Find the largest size that fits on every rank, say it and keep it; called on all ranks.

    Args:
        setup: of this rank.
        state: its gradients, buffers and random numbers may be written over.
        try_out: leaves gradients of this many rows in the model, without the other ranks.
    Raises: OutOfMemory: not even the smallest fits.
    """
    rows, has_statistics = _most(setup), _looks_at_batches(state.model)
    left, said, failure = sizes(rows, 2 if has_statistics else 1), "", ""
    buffers = _copies(state.model)

    def fits(size: int) -> bool:
        nonlocal failure
        setup.watchdog.tick()
        try:
            try_out(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = _first_line(error)
        else:
            return True
        finally:
            _forget(state, buffers)
        return False

    neighbours = _ranks_here(setup)
    with _room_for_optimizer(state) as room_bytes, alone(state.model):
        if setup.device.type == "cpu":
            left, said = _within(left, fits, free_bytes() / neighbours - room_bytes)
        mine = next((size for size in left if fits(size)), 0)
    size = _least(mine, setup)
    setup.watchdog.tick()
    if not size:
        raise OutOfMemory(_hopeless(left[-1], failure))
    state.micro_batch = size
    if setup.rank == 0:
        _keep(setup, size)
    message = f"train.micro_batch=auto: {size} of a worker's {rows} images at a time{said}"
    if size < rows and has_statistics:
        message += (
            f"; batch normalisation sees {size} images, not {rows}: the update is not quite that of the whole batch, "
            "model.norm=group makes it so"
        )
    _tell(setup, state, message)


def fitting(setup: "Setup", state: "State", gradients: Callable[[], T]) -> T:
    """What `gradients` returns, with smaller micro-batches from now on if memory runs out.

    Raises: Leaves: among several ranks, after the smaller size was kept. OutOfMemory: no smaller one is left, or
        train.micro_batch is not auto.
    """
    is_auto = setup.experiment.train.micro_batch == "auto"
    buffers = _copies(state.model) if is_auto else []
    while True:
        try:
            return gradients()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = _first_line(error)
        # Only here, where the error and all that its frames held are gone, is there room for another try.
        _forget(state, buffers)
        size = state.micro_batch
        smaller = [less for less in sizes(_most(setup), 2 if _looks_at_batches(state.model) else 1) if less < size]
        if not is_auto or not smaller:
            raise OutOfMemory(_hopeless(size, failure, is_auto=is_auto))
        _keep(setup, smaller[0])
        said = f"memory ran out with {size} images at a time ({failure[:120]}): "
        if setup.ranks > 1:
            raise Leaves(f"{said}the workers start again with {smaller[0]}")
        state.micro_batch = smaller[0]
        _tell(setup, state, f"{said}this step is repeated with {smaller[0]}, and so is every other")


class InParts(torch.nn.Module):
    """A network that scores a batch in parts, since one whose gradients do not fit may not fit either."""

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        """Pass on at most `size` rows at a time; 0 means all."""
        super().__init__()
        self.model, self.size, self.training = model, size, model.training

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of [B, C, H, W]."""
        done = [self.model(images[part]) for part in parts(slice(0, len(images)), self.size)]
        return done[0] if len(done) == 1 else torch.cat(done)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, on a GPU or on the host."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in WORDS)


def _most(setup: "Setup") -> int:
    """Rows that may go through at once: this rank's share, or a logical shard of train.exact."""
    train = setup.experiment.train
    return train.batch // (SHARDS if train.exact else setup.ranks)


def _within(left: list[int], fits: Callable[[int], bool], free: float) -> tuple[list[int], str]:
    """The sizes whose gradients a CPU's memory holds, the smallest in any case; and what there is to say about it.

    What a try of few images takes, in proportion to their number, is more than what many take.
    """
    for size in reversed(left):
        found: list[bool] = []
        grown = growth(lambda: found.append(fits(size)))  # noqa: B023 - called at once
        if grown is None:
            return left, " (this system does not tell what a process takes: nothing is known of the memory it needs)"
        if not found[0]:
            return [one for one in left if one < size] or [size], ""
        per_image = grown / size
        holding = [one for one in left if one * per_image <= SAFE * free]
        if left[0] in holding or grown > TELLING * free:
            break
    told = f" (about {left[0] * per_image / 1e9:.2g} GB for {left[0]}, {max(0.0, free) / 1e9:.2g} GB are free)"
    return holding or left[-1:], told


def _looks_at_batches(model: torch.nn.Module) -> bool:
    """Whether a layer learns from the statistics of a batch."""
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())


@contextmanager
def _room_for_optimizer(state: "State") -> Iterator[int]:
    """Hold as much memory as the optimiser's state will take; its bytes."""
    if state.optimizer.state:
        yield 0
        return
    settings = state.optimizer.defaults
    copies = 2 if "betas" in settings else int(settings.get("momentum", 0) > 0)
    learns = [p for p in state.model.parameters() if p.requires_grad]
    held = [torch.empty_like(p) for p in learns for _ in range(copies)]
    yield sum(p.nbytes for p in held) + sum(p.nbytes for p in learns)
    del held


def _copies(model: torch.nn.Module) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The buffers of a model, and copies of them; one kernel for each kind, since each step makes them."""
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in model.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    found = [(buffers, [torch.empty_like(one) for one in buffers]) for buffers in kinds.values()]
    for buffers, copies in found:
        torch._foreach_copy_(copies, buffers)
    return found


def _forget(state: "State", buffers: list[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> None:
    """Throw gradients away, put the buffers back, and give the device what is free."""
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for now, before in buffers:
            torch._foreach_copy_(now, before)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _ranks_here(setup: "Setup") -> int:
    """Ranks that share this machine's memory."""
    if setup.ranks == 1:
        return 1
    everyone: list[Any] = [None] * setup.ranks
    dist.all_gather_object(everyone, socket.gethostname())
    return everyone.count(socket.gethostname())


def _least(size: int, setup: "Setup") -> int:
    """The smallest of all ranks."""
    least = torch.tensor([size], device=setup.device)
    if setup.ranks > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least.item())


def _tell(setup: "Setup", state: "State", message: str) -> None:
    told = {"system/micro_batch": float(state.micro_batch)}
    point = {"kind": "metrics", "step": state.updates + 1, "time_ms": int(time.time() * 1000), "metrics": told}
    setup.report([point, {"kind": "progress", "message": message}])


def _keep(setup: "Setup", size: int) -> None:
    told = {"rows": _most(setup), "size": size}
    storage.put(storage.join(setup.run, FILE), json.dumps(told).encode())


def _kept(setup: "Setup") -> int:
    """The size that this run has found for such a share; 0 if there is none."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        told = json.loads(storage.get(storage.join(setup.run, FILE)))
        if told["rows"] == _most(setup) and isinstance(told["size"], int) and 0 < told["size"] <= told["rows"]:
            return int(told["size"])
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _hopeless(size: int, failure: str, *, is_auto: bool = True) -> str:
    auto = "" if is_auto else "train.micro_batch=auto, "
    least = "as few as " if is_auto else ""
    return (
        f"memory ran out in the forward and backward pass of {least}{size} images at a time ({failure[:200]}): set "
        f"{auto}train.recompute=true, train.precision=bf16, a smaller data.size_px, upscale.factor "
        "or network, or model.norm=group, with which images may go through one by one; the same "
        "command goes on"
    )
