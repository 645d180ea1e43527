"""SPDL: a pipeline of threads over files; each thread makes whole batches with simplejpeg and OpenCV."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.feeds.work import SIDE, Epochs, Work, decode_crop, number_of

FORMATS = ("files",)


def open_feed(work: Work) -> Epochs:
    import cv2
    from spdl.pipeline import PipelineBuilder

    cv2.setNumThreads(1)
    folder, names = Path(work.place("files/train")), work.names("files/train", "*.jpg")

    def load(part: list[int]) -> tuple[Any, Any]:
        draws = np.random.default_rng().random((len(part), 5))
        out = np.empty((len(part), SIDE, SIDE, 3), np.uint8)
        for at, index in enumerate(part):
            decode_crop((folder / names[index]).read_bytes(), draws[at], out[at])
        return out, [number_of(names[index]) for index in part]

    def epoch(number: int) -> Iterator[tuple[Any, Any]]:
        order = np.random.default_rng(number).permutation(len(names)).tolist()
        builder = PipelineBuilder().add_source(order).aggregate(work.batch).pipe(load, concurrency=work.workers)
        pipeline = builder.add_sink(4).build(num_threads=work.workers)
        with pipeline.auto_stop():
            yield from pipeline

    return epoch
