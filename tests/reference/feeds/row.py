"""One feed in a process of its own: two epochs, each told as a line of JSON.

    python -m tests.reference.feeds.row NAME WORK

A line has the seconds from asking for the epoch to its first batch and to its end, CPU seconds of the whole tree
meanwhile, and whether each image came exactly once. With a rate, a step of batch/rate seconds follows each batch, in
which this thread sleeps, as a host does while its accelerator computes; `busy` is the share of the epoch spent so.
"""

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

import numpy as np

from tests.reference.feeds import processes
from tests.reference.feeds.work import SIDE, Epochs, Work, work_of

FIRST = '{"first": true}'
"""Printed at the first batch of an epoch: memory is looked at from then on."""


def take(epochs: Epochs, work: Work, number: int, rate: float | None) -> dict[str, Any]:
    """Consume one epoch.

    Raises: RuntimeError: an image is missing or came twice, or a batch has another shape.
    """
    seen: list[Any] = []
    first_s, computing_s = 0.0, 0.0
    began_cpu_s, began = processes.cpu_s(os.getpid()), time.perf_counter()
    for pixels, numbers in epochs(number):
        if not first_s:
            first_s = time.perf_counter() - began
            print(FIRST, flush=True)
        count = len(numbers)
        if tuple(pixels.shape) not in {(count, SIDE, SIDE, 3), (count, 3, SIDE, SIDE)} or "uint8" not in str(
            pixels.dtype
        ):
            raise RuntimeError(f"a batch of {count} has {pixels.dtype} {tuple(pixels.shape)}")
        seen.extend(np.asarray(numbers).tolist())
        if rate:
            step_began = time.perf_counter()
            time.sleep(count / rate)
            computing_s += time.perf_counter() - step_began
    wall_s = time.perf_counter() - began
    cpu_s = processes.cpu_s(os.getpid()) - began_cpu_s
    if sorted(seen) != list(range(work.images)):
        raise RuntimeError(f"{len(seen)} images came, {len(set(seen))} different ones, {work.images} are there")
    return {"epoch": number, "first_s": first_s, "wall_s": wall_s, "cpu_s": cpu_s, "busy": computing_s / wall_s}


def main() -> None:
    name, values = sys.argv[1], json.loads(sys.argv[2])
    rate = values.pop("rate", None)
    work = work_of(values)
    processes.adopt_orphans()
    if work.store:
        os.environ |= work.store.environment
    try:
        epochs = importlib.import_module(f"tests.reference.feeds.{name}").open_feed(work)
        for number in (0, 1):
            print(json.dumps(take(epochs, work, number, rate)), flush=True)
    except BaseException:
        traceback.print_exc()
        processes.end_below(os.getpid())
        os._exit(1)
    processes.end_below(os.getpid())  # some peers hang in their own shutdown
    os._exit(0)


if __name__ == "__main__":
    main()
