"""Ranks of a run as plain processes joined by gloo: what Ray Train does around the loop, without its start-up."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

from scalecv import config
from scalecv.artifacts import spool
from scalecv.train import runs

ROOT = Path(__file__).parents[2]
LEFT = 17
"""Exit status of a rank that left because one of them was told to."""


def start(experiment, ranks, folder):
    """Start the ranks of an experiment's run; they go on where the ones before stopped."""
    run = runs.open_run(experiment, lambda _: None)
    told = {"experiment": experiment.model_dump(mode="json"), "version": run.dataset.version, "run": run.uri}
    told |= {"ranks": ranks, "meet": f"file://{folder}/{uuid.uuid4().hex}"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.ranks", json.dumps({**told, "rank": rank})],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def ended(processes, timeout_s=120):
    """Exit statuses of the ranks, and what they said."""
    said = [process.communicate(timeout=timeout_s)[1] for process in processes]
    return [process.returncode for process in processes], said


def main(told):
    from torch import distributed as dist

    from scalecv.train.job import Job, Place
    from scalecv.train.requests import Leaves, hear_sigterm
    from scalecv.train.worker import work

    rank, ranks, run = told["rank"], told["ranks"], told["run"]
    if ranks > 1:
        dist.init_process_group("gloo", init_method=told["meet"], rank=rank, world_size=ranks)
    hear_sigterm()

    def report(events):
        for event in events if rank == 0 else []:
            spool.append(f"{run}/spool.jsonl", event)

    experiment = config.build(told["experiment"], "test")
    try:
        work(Job(experiment, told["version"], run, "threads"), Place(rank, ranks, ranks), report)
    except Leaves:
        os._exit(LEFT)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
