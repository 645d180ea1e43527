"""Two processes joined by gloo."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, work: Callable[[int], Any], meet: Path, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    queue.put((rank, work(rank)))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo that the interpreter's end meets in C++ ends the process with an abort


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a module's function returns on each of two ranks, by rank; plain values, no tensors."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, work, folder / "meet", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict((queue.get(), queue.get()))
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return [found[0], found[1]]
