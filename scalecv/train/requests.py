"""What is asked of a run while it trains: to save, to stop, to leave. Heard by each rank, agreed on by all of them.

Rank 0 hears the STOP file, its clock and the notice of a preemption; any rank hears a SIGTERM to its process. At each
step the ranks take the union by one all-reduce of three numbers, which is under way while the update is computed: what
was heard before a step has begun is acted on when it ends, by all ranks at the same one.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from scalecv import storage
from scalecv.train.watchdog import LEAVE_S

DRAIN_SAVE_S = 10.0
"""Seconds between checkpoints while the node of a rank is about to be taken away."""
LOCAL_LOOK_S, REMOTE_LOOK_S = 0.05, 1.0
"""Seconds between two looks for the STOP file: on a disk, and in an object store."""

terminated = threading.Event()
"""Set by a SIGTERM to this process, where `hear_sigterm` was called."""


@dataclass(frozen=True)
class Asked:
    """What all ranks agree on."""

    save: bool = False
    stop: bool = False
    """Save, and end the run for now."""
    leave: bool = False
    """Save, for a process of this run is about to be ended; the run goes on with another one."""


class Stopped(Exception):
    """The run ends here, as it was asked to; its state is saved."""


class Leaves(Exception):
    """A worker was told to go; its state is saved, and it is started again elsewhere."""


class Requests:
    """Hears what is asked, from `__enter__` to `__exit__`."""

    def __init__(
        self,
        stop_file: str,
        minutes: float,
        *,
        rank: int = 0,
        ranks: int = 1,
        stop: threading.Event | None = None,
        drains: Callable[[], bool] = lambda: False,
    ) -> None:
        """Hear for one rank.

        Args:
            stop_file: URI that rank 0 looks for.
            minutes: after which a checkpoint is due.
            rank: this rank.
            ranks: how many there are; all of them make their Requests at the same place.
            stop: set by somebody in this process who wants the run to stop.
            drains: whether a node of this run is about to be taken away; asked on rank 0, must not block.
        """
        self.stop_file, self.rank, self.ranks, self.drains = stop_file, rank, ranks, drains
        self.stop = stop or threading.Event()
        self.interval_s = minutes * 60
        self.is_draining = False
        self.due = time.monotonic() + self.interval_s
        self.ended = threading.Event()
        # Flags never wait for the device: where gradients go by NCCL, they have a group of their own.
        self.group: Any = dist.new_group(backend="gloo") if ranks > 1 and dist.get_backend() != "gloo" else None
        self.flags = torch.zeros(3, dtype=torch.int32)
        self.work: Any = None
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "Requests":
        if self.rank == 0:
            self.thread = threading.Thread(target=self._listen, name="requests", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join(LEAVE_S)

    def begin(self, *, save: bool = False) -> None:
        """Say what this rank has heard, and that it wants a checkpoint; all ranks call it equally often."""
        self.flags = self._heard(save=save or self._is_due())
        if self.ranks > 1:
            self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, self.group, async_op=True)

    def end(self) -> Asked:
        """What all ranks have said at `begin`; a rank that is alone answers at once."""
        if self.ranks > 1:
            self.work.wait()
        else:
            self.flags |= self._heard()
        save, stop, leave = (bool(flag) for flag in self.flags.tolist())
        return Asked(save or stop or leave, stop, leave)

    def saved(self) -> None:
        """A checkpoint was taken: the clock begins again."""
        self.due = time.monotonic() + (min(DRAIN_SAVE_S, self.interval_s) if self.is_draining else self.interval_s)

    def wait(self, is_done: Callable[[float], bool], moved: Callable[[], None]) -> None:
        """Wait on all ranks until something is done on rank 0.

        Args:
            is_done: waits some seconds at most, and says whether it is; asked on rank 0.
            moved: called while there is hope.
        """
        while True:
            waits = torch.tensor([int(self.rank == 0 and not is_done(0.2))], dtype=torch.int32)
            if self.ranks > 1:
                dist.all_reduce(waits, dist.ReduceOp.MAX, self.group)
            if not waits.item():
                return
            moved()

    def _heard(self, *, save: bool = False) -> torch.Tensor:
        return torch.tensor([save, self.stop.is_set(), terminated.is_set()], dtype=torch.int32)

    def _is_due(self) -> bool:
        if self.rank != 0:
            return False
        if not self.is_draining and self.drains():
            self.is_draining, self.due = True, 0.0
        return time.monotonic() >= self.due

    def _listen(self) -> None:
        pause = LOCAL_LOOK_S if storage.is_local(self.stop_file) else REMOTE_LOOK_S
        while not self.ended.wait(pause):
            with contextlib.suppress(Exception):  # a store that is away is no reason to stop
                if storage.exists(self.stop_file):
                    self.stop.set()
                    return


def hear_sigterm() -> None:
    """Take a SIGTERM to this process as a request to save and leave, and a second one as an order to end."""

    def handle(number: int, frame: FrameType | None) -> None:
        if terminated.is_set():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        terminated.set()

    signal.signal(signal.SIGTERM, handle)
