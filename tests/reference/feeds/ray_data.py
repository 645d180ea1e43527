"""Ray Data: read_parquet, decode in map_batches with simplejpeg and OpenCV, iter_batches: the way of its documents."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.reference.feeds.work import Decode, Epochs, Work

FORMATS = ("parquet",)


def decode(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    change = Decode()
    return {"image": np.stack([change(data) for data in rows["image"]]), "number": rows["number"]}


def open_feed(work: Work) -> Epochs:
    import ray

    ray.init(address="local", num_cpus=work.workers, include_dashboard=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    place, filesystem = work.place("parquet"), None
    if work.store:
        from pyarrow.fs import S3FileSystem

        keys = {"access_key": work.store.key, "secret_key": work.store.secret}
        filesystem = S3FileSystem(endpoint_override=work.store.endpoint, region="us-east-1", **keys)
        place = place.removeprefix("s3://")
    rows = ray.data.read_parquet(place, filesystem=filesystem, shuffle="files")
    pixels = rows.map_batches(decode, batch_size=work.batch)

    def epoch(number: int) -> Iterator[tuple[Any, Any]]:
        for batch in pixels.iter_batches(batch_size=work.batch):
            yield batch["image"], batch["number"]

    return epoch
