"""scalecv: planned order, augmentation by sample id, exact resume; row groups of a dataset, threads that decode."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from tests.reference.feeds.work import SIDE, Epochs, Work, number_of

FORMATS = ("dataset",)
EPOCHS = 2
"""One after the other, as training takes them: the first batches of the second are made while the first one ends."""


def open_feed(work: Work) -> Epochs:
    from scalecv.batches.feed import Feed
    from scalecv.batches.pixels import pixels_of
    from scalecv.config import Augment, Data
    from scalecv.shards.store import open_dataset

    uri = work.place("dataset")
    dataset = open_dataset(uri)
    how = Data(uri=uri, size_px=SIDE, augment=Augment(resized_crop=(0.08, 1.0), hflip=0.5))
    pixels = pixels_of(dataset.manifest, how, uri)
    feed = Feed(dataset, "train", pixels, work.batch, seed=0, is_training=True, threads=work.workers)

    left = ExitStack()
    upcoming = left.enter_context(feed.epochs(0, 0, EPOCHS))

    def epoch(number: int) -> Iterator[tuple[Any, Any]]:
        for _, batch in next(upcoming):
            valid, images = batch["valid"].numpy(), batch["image"]
            numbers = [number_of(path) for path, counts in zip(batch["path"], valid.tolist(), strict=True) if counts]
            yield images if valid.all() else images[: len(numbers)], numbers
        if number == EPOCHS - 1:
            left.close()

    return epoch
