"""LitData over its chunks, simplejpeg and OpenCV; from S3 into a cache folder that starts empty."""

import tempfile
from typing import Any

import numpy as np

from tests.reference.feeds.work import Decode, Epochs, Work

FORMATS = ("litdata",)


def open_feed(work: Work) -> Epochs:
    from litdata import StreamingDataLoader, StreamingDataset

    remote: dict[str, Any] = {}
    if work.store:
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # no option of its own says so
        keys = {"aws_access_key_id": work.store.key, "aws_secret_access_key": work.store.secret}
        remote["storage_options"] = {"endpoint_url": work.store.endpoint, "region_name": "us-east-1", **keys}
        remote["cache_dir"] = tempfile.mkdtemp(prefix="litdata-")
    dataset = StreamingDataset(work.place("litdata"), shuffle=True, drop_last=False, transform=Sample(), **remote)
    loader = StreamingDataLoader(dataset, batch_size=work.batch, num_workers=work.workers, persistent_workers=True)
    return lambda epoch: iter(loader)


class Sample:
    """An item of a chunk as pixels and number."""

    def __init__(self) -> None:
        self.decode = Decode()

    def __call__(self, item: dict[str, Any]) -> tuple[np.ndarray, int]:
        return self.decode(item["image"]), item["number"]
