"""Two ranks train together and one of them dies at a point of rank 0's writing; then both start again.

    python -m tests.contracts.two_ranks EVERY      one line for each EVERYth point: verdict, victim, point

A process of its own, which forks the ranks after torch is imported: it must not have started a thread before.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from scalecv import storage
from scalecv.testing.crash_points import Operation, Point, dying_at, end_process, operations, points
from tests.contracts import tiny_run

FORK = multiprocessing.get_context("fork")
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None


def work(folder: str, attempt: str, rank: int, victim: int | None, point: Point | None) -> None:
    """One rank of one attempt; what rank 0 had completed when somebody died is left in a file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    box, pids = Path(folder, attempt), Path(folder, attempt + ".pid")
    if rank == 1:
        pids.write_text(str(os.getpid()))
    dist.init_process_group("gloo", init_method=f"file://{box}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    run = str(Path(folder) / "run")
    done: list[Operation] = []

    def die() -> None:
        manifests = [o.uri for o in done if o.uri.endswith("/manifest.json") and o.kind == "put"]
        complete = max((int(uri.rpartition("checkpoints/")[2][:8]) for uri in manifests), default=0)
        Path(folder, "complete").write_text(str(complete))
        if victim == 0:
            end_process()
        os.kill(int(pids.read_text()), signal.SIGKILL)

    if rank == 0 and point is not None:
        with dying_at(point, die) as complete:
            done = complete
            tiny_run.train(run, rank=0, ranks=2)
        return
    _, found = tiny_run.train(run, rank=rank, ranks=2)
    Path(folder, f"found{rank}").write_text(str(found))


def attempt(folder: str, name: str, victim: int | None = None, point: Point | None = None) -> list[int | None]:
    """Exit codes of two ranks; None for one that hung and was ended."""
    ranks = [FORK.Process(target=work, args=(folder, name, rank, victim, point)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    exits = [process.exitcode for process in ranks]
    for process in ranks:
        if process.exitcode is None:
            process.kill()
            process.join()
    return exits


def verdict(folder: str, victim: int, point: Point, quiet: tuple[str, str, str]) -> str:
    first = attempt(folder, "first", victim, point)
    if None in first or first[victim] not in (137, -signal.SIGKILL):
        return f"HARD_FAIL (first attempt ended with {first})"
    second = attempt(folder, "second")
    if second != [0, 0]:
        return f"HARD_FAIL (second attempt ended with {second})"
    found = [int(Path(folder, f"found{rank}").read_text()) for rank in (0, 1)]
    if found[0] != found[1] or tiny_run.outcome(str(Path(folder, "run")))[:2] != quiet[:2]:
        return "SILENT"
    return "PASS" if found[0] >= int(Path(folder, "complete").read_text()) else "LOST_WORK"


def main(every: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        found = operations(lambda: tiny_run.train(str(Path(folder, "alone"))))  # imports, too, what training imports
        assert attempt(folder, "quiet") == [0, 0]
        quiet = tiny_run.outcome(str(Path(folder, "run")))
    found = [o for o in found if storage.join("checkpoints", "0000000") in o.uri or "checkpoints" not in o.uri]
    cases = [(0, point) for point in points(found) if point.cut in (0.5, 1.0)]
    cases += [
        (1, point) for point in points(found) if point.moment == "before" and "checkpoints" in point.operation.uri
    ]
    for victim, point in cases[::every]:
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            print(verdict(folder, victim, point, quiet), victim, point, sep="\t", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
