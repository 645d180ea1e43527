"""Chunks of a prediction to Ray Data: actors that hold the model, one for each CPU or GPU."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from scalecv import runtime
from scalecv.errors import ScalecvError, StorageError
from scalecv.serve.predict_chunk import Job, Worker
from scalecv.shards.dispatch import PLACES, quiet

RETRIES = 3


class Actor:
    """A model in a Ray actor."""

    def __init__(self, job: Job, places: dict[str, str], folder: str) -> None:
        for name, value in places.items():
            os.environ.setdefault(name, value)
        if job.allow_import:
            sys.path.append(folder)
        self._job = job
        self._worker: Worker | None = None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Do one chunk; its record, or the error that ended it."""
        try:
            self._worker = self._worker or Worker(self._job, threads=1)
            record = self._worker(json.loads(item["chunk"]))
        except ScalecvError as error:
            return {"record": "", "error": str(error), "error_type": type(error).__name__}
        return {"record": json.dumps(record), "error": "", "error_type": ""}


def run(job: Job, chunks: list[dict[str, Any]], concurrency: int | None) -> Iterator[dict[str, Any]]:
    """What actors said of each chunk: record (JSON), or error and error_type.

    Raises: StorageError: an actor was lost too often.
    """
    runtime.connect()
    import ray
    import ray.data

    cpus, gpus = runtime.resources()
    most = concurrency or max(1, int(gpus or cpus))
    places = {name: os.environ[name] for name in PLACES if name in os.environ}
    items = [{"chunk": json.dumps(chunk)} for chunk in chunks]
    with quiet(ray.data.DataContext.get_current()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        done = ray.data.from_items(items, override_num_blocks=len(items)).map(
            Actor,
            fn_constructor_kwargs={"job": job, "places": places, "folder": os.getcwd()},
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            concurrency=min(most, len(items)),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
        try:
            yield from done.iter_rows()
        except (ray.exceptions.RayError, ray.exceptions.RaySystemError) as error:
            said = str(error).strip().splitlines()[-1][:200]
            raise StorageError(f"a chunk failed {RETRIES + 1} times ({said}): the same command goes on") from error
