"""How fast the parts of an experiment are on this machine, each alone, and how near training comes to the slowest."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from scalecv.config import Experiment
from scalecv.shards.store import open_dataset
from scalecv.speed import trial


@dataclass(frozen=True)
class Part:
    """One line of the report."""

    name: str
    images_per_s: float
    about: str


@dataclass(frozen=True)
class Speeds:
    """What was measured, and what it means."""

    parts: tuple[Part, ...]
    step_s: dict[str, float]
    """Seconds of one training step, by part."""
    data_wait_share: float
    feed_share: float
    """The feed by the slower of reading and decoding alone: what joining them costs."""
    bottleneck: str
    """reading, decoding or the network."""

    def lines(self) -> list[str]:
        """The report for a person."""
        wide = max(len(part.name) for part in self.parts)
        shown = [f"{part.name:{wide}}  {part.images_per_s:10,.0f} images/s  {part.about}" for part in self.parts]
        steps = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in self.step_s.items())
        return [*shown, f"a training step: {steps}", f"what takes the time: {self.bottleneck}"]


def measure(experiment: Experiment, seconds: float = 5.0, tell: Callable[[str], None] = lambda line: None) -> Speeds:
    """Measure reading, decoding, the feed and training, some seconds each.

    Reading from a local disk is reading from memory when the files were read before; a bucket is read for real.

    Raises: UserError: the experiment cannot be run.
    """
    from scalecv.batches import crops
    from scalecv.batches.collate import fill
    from scalecv.batches.feed import Feed, threads_per_rank
    from scalecv.batches.pixels import pixels_of
    from scalecv.train.checks import check

    dataset = open_dataset(experiment.data.uri, experiment.data.version, experiment.cache)
    check(experiment, dataset.manifest)
    experiment = trial.one_worker(experiment)
    pixels = pixels_of(dataset.manifest, experiment.data, experiment.data.uri, experiment.task)
    threads = threads_per_rank(experiment.data.decode_threads, 1)
    reader = "threads" if experiment.data.reader == "auto" else experiment.data.reader
    feed = Feed(
        dataset,
        "train",
        pixels,
        experiment.train.batch,
        seed=experiment.seed,
        is_training=True,
        window_mb=experiment.data.window_mb,
        threads=threads,
        reader=reader,
        max_bad=experiment.data.max_bad,
        sampling=experiment.data.sampling,
        limit=experiment.data.limit,
    )
    if experiment.data.decode in ("cluster", "gpu"):
        tell(f"data.decode={experiment.data.decode} is left out: what threads of this machine decode is measured")
    per_image = dataset.manifest.encoded_bytes / max(1, dataset.manifest.rows)
    tell(f"reading, {seconds:g} s")
    read = _rate(_forever(lambda epoch: (len(table) for table in feed.tables(epoch))), seconds)
    tell(f"decoding, {seconds:g} s")
    rows = feed.some_rows(4 * experiment.train.batch)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:

        def decoded(epoch: int) -> Iterator[int]:
            ahead: list[Any] = []
            for first in range(0, len(rows), experiment.train.batch):
                some = rows[first : first + experiment.train.batch]
                ahead.append((fill(some, pixels, (experiment.seed, epoch), pool, 2 * threads), len(some)))
            for filling, size in ahead:
                filling.wait()
                yield size

        decode = _rate(_forever(decoded), seconds)
    tell(f"the feed, {seconds:g} s")
    with feed.epochs(0, 0, 1_000_000) as epochs:
        fed = _rate((int(batch["valid"].sum()) for epoch in epochs for _, batch in epoch), seconds)
    tell(f"training, {seconds:g} s")
    trained = trial.run(experiment, dataset, seconds)
    busy = sum(took for part, took in trained.seconds.items() if part != "wait")
    network = experiment.train.batch / max(busy, 1e-9)
    by_cpu = [(decode, "decoding")] if experiment.data.decode != "gpu" else []
    slowest = min((read, "reading"), *by_cpu, (network, "the network"))
    many = f"{threads} thread{'s' if threads > 1 else ''}"
    return Speeds(
        parts=(
            Part("reading", read, f"{read * per_image / 1e6:,.0f} MB/s of encoded images, in the planned order"),
            Part("decoding", decode, f"{many}, {crops.state()}"),
            Part("feed", fed, f"reading and decoding together: {fed / min(read, decode):.0%} of the slower one"),
            Part("network", network, "steps without waiting, while the feed works beside them"),
            Part("training", trained.images_per_s, f"data wait {trained.wait_share:.0%}, {trained.steps} steps"),
        ),
        step_s=trained.seconds,
        data_wait_share=trained.wait_share,
        feed_share=fed / min(read, decode),
        bottleneck=slowest[1],
    )


def _forever(each: Callable[[int], Iterator[int]]) -> Iterator[int]:
    return itertools.chain.from_iterable(map(each, itertools.count()))


def _rate(sizes: Iterator[int], seconds: float) -> float:
    """Images per second from the end of the first piece on."""
    next(sizes)
    images, began = 0, time.perf_counter()
    for size in sizes:
        images += size
        took = time.perf_counter() - began
        if took > seconds:
            break
    return images / took
