"""Some seconds of an experiment's own training, in this process: its speed, and where its steps' time goes."""

import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

from scalecv.config import Experiment
from scalecv.errors import ScalecvError
from scalecv.shards.store import Dataset

WARM_STEPS = 2
"""Steps of a trial that count nowhere: kernels are chosen, memory is got, the feed fills."""
PARTS = ("wait", "transfer", "compute", "sync", "optimizer")


@dataclass(frozen=True)
class Trial:
    """What was seen of the steps that count."""

    images_per_s: float
    wait_share: float
    """Of the time, that steps waited for their batch."""
    seconds: dict[str, float]
    """Of one step, by part: wait, transfer, compute, sync, optimizer."""
    steps: int
    micro_batch: int = 0
    """Images at a time, where the run had to find it."""


def run(experiment: Experiment, dataset: Dataset, seconds: float, least: int = 3) -> Trial:
    """Train for some seconds from the start, in a folder that is thrown away; nothing is recorded.

    Args:
        experiment: what to train; each of its workers' share, in this process.
        dataset: its own.
        seconds: of the steps that count.
        least: steps that count, however long they take.
    Raises: ScalecvError: no step could be measured.
    """
    import torch

    from scalecv.train.job import Job, Place
    from scalecv.train.worker import work

    experiment = one_worker(experiment)
    here = {"workers": 0, "hang_after_s": 1e6}
    track = {"log_every": 1, "pictures": 0, "checkpoint_minutes": 1e6, "checkpoint_steps": None}
    short = experiment.model_copy(
        update={
            "scale": experiment.scale.model_copy(update=here),
            "track": experiment.track.model_copy(update=track),
            "model": experiment.model.model_copy(update={"weights": None}),  # which change no speed
            "train": experiment.train.model_copy(update={"epochs": 1_000_000, "early_stop_patience": None}),
        }
    )
    device = "cuda" if experiment.scale.gpu != "no" and torch.cuda.is_available() else "cpu"
    steps: list[tuple[int, dict[str, float]]] = []
    stop = threading.Event()
    until, micro = [float("inf")], [0]

    def hear(events: list[dict[str, Any]]) -> None:
        for event in events:
            micro[0] = int(event.get("metrics", {}).get("system/micro_batch", micro[0]))
            if event["kind"] == "progress" and "step" in event:
                steps.append((event["step"], event["metrics"]))
                if len(steps) == WARM_STEPS:
                    until[0] = time.monotonic() + seconds
        if time.monotonic() > until[0] and len(steps) >= WARM_STEPS + least:
            stop.set()

    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="scalecv-trial-") as folder:
            reader = "threads" if experiment.data.reader == "auto" else experiment.data.reader
            work(Job(short, dataset.version, folder, reader), Place(device=device), hear, stop=stop)
    finally:
        torch.set_num_threads(threads)
    counted = [told for step, told in steps[WARM_STEPS:] if step > 1]  # the first of an epoch follows a validation
    if not counted:
        raise ScalecvError("training ended before a step could be measured: ingest more images, or lower train.batch")
    batch = experiment.train.batch
    took = [batch / max(told["system/images_per_s"], 1e-9) for told in counted]
    waited = sum(told["system/data_wait_share"] * s for told, s in zip(counted, took, strict=True))
    parts = {part: sum(told.get(f"time/{part}_s", 0.0) for told in counted) / len(counted) for part in PARTS}
    parts["wait"] = waited / len(counted)
    return Trial(batch * len(counted) / sum(took), waited / sum(took), parts, len(counted), micro[0])


def one_worker(experiment: Experiment) -> Experiment:
    """The experiment with the share of a batch that each of its workers gets."""
    share = experiment.train.batch // max(1, experiment.scale.workers)
    return experiment.model_copy(update={"train": experiment.train.model_copy(update={"batch": share})})
