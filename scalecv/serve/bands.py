"""`scalecv bands MODEL DATASET`: how much a model leans on each band, on every row of a split.

Permutation importance (Breiman 2001; Fisher, Rudin, Dominici 2019): a band's pixels are replaced by those of another
row, so that its values stay plausible and say nothing about this row; what the headline metric loses is the band's
importance. Beside it: what is lost where the band is set to its mean. Bands that say the same stand in for each other
and look unimportant both: training without a band (`--drop`) tells that apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalecv import storage
from scalecv.artifacts import bundle, tracking
from scalecv.display import duration
from scalecv.errors import ConfigError, DataError
from scalecv.serve.evaluate import check, pixels_for
from scalecv.shards.store import open_dataset

if TYPE_CHECKING:
    import torch

    from scalecv.batches.feed import Feed
    from scalecv.tasks.task import Task

Event = dict[str, Any]


@dataclass(frozen=True)
class Band:
    """What a metric loses without a band; below 0 where it gains."""

    band: int
    """Counted from 1 in the order of the file."""
    permuted: float
    """Mean over repeats, with the pixels of another row."""
    permuted_se: float
    """Standard error of that mean; NaN for one repeat."""
    at_mean: float
    """With the band set to its mean."""


@dataclass(frozen=True)
class Importance:
    """The bands of a model, most important first."""

    metric: str
    """As val/iou."""
    value: float
    """Of the model with all bands."""
    bands: tuple[Band, ...]
    rows: int
    repeats: int
    bundle: str
    dataset: str
    fingerprint: str
    chart: str | None
    """Where the chart lies."""


def rank_bands(
    model: str,
    dataset_uri: str,
    *,
    split: str = "val",
    repeats: int = 5,
    seed: int = 0,
    batch: int = 64,
    to: str | None = None,
    allow_import: bool = False,
    tell: Callable[[Event], None] = lambda _: None,
) -> Importance:
    """Rank the bands of a model by what its headline metric loses without them.

    Args:
        model: bundle folder, runs:/ID or models:/NAME@ALIAS.
        dataset_uri: what `scalecv ingest` wrote.
        split: train, val or test.
        repeats: times that the rows are put in another order.
        seed: of the orders.
        batch: images at a time, 2 at least; each gets the pixels of its neighbour.
        to: folder for a chart; None draws none.
        allow_import: let a bundle whose network is the user's own function import it.
        tell: called with progress events.
    Raises: DataError: the dataset does not fit the model. ConfigError: a model that tells nothing apart.
    """
    import os
    import time

    import torch

    from scalecv.batches.feed import Feed
    from scalecv.tasks import task_for

    opened = bundle.open_bundle(tracking.lookup(model), allow_import=allow_import)
    dataset = open_dataset(dataset_uri)
    if opened.facts.task == "upscale":
        raise ConfigError(
            f"{model} is a model for task=upscale, which gives back the bands that it is shown: scalecv bands ranks "
            "those of models for classify and segment"
        )
    check(opened, dataset.manifest, dataset_uri, split)
    if dataset.manifest.splits[split] < 2:
        raise DataError(
            f"{storage.without_secrets(dataset.uri)} has one row in {split}: a band's pixels are taken from another "
            "row, so two are needed; take another --split"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = pixels_for(opened, dataset.manifest)
    task = task_for(opened.facts.task, pixels, opened.facts.call.arch, opened.facts.call.args)
    network = opened.model.to(device)
    feed = Feed(dataset, split, pixels, batch, seed=seed, is_training=True, threads=os.cpu_count() or 1)
    scores: list[dict[str, float]] = []
    rows, passes = dataset.manifest.splits[split], 1 + pixels.channels
    planned = f"{pixels.channels} bands in {repeats} orders: {repeats * passes + pixels.channels} times {rows:,} rows"
    tell({"kind": "progress", "message": f"{planned} of {split} through the network on {device}"})
    began = time.perf_counter()
    for repeat in range(repeats):
        left = ""
        if repeat:  # the first order has a pass more for each band, at its mean
            each = (time.perf_counter() - began) / (repeat * passes + pixels.channels)
            left = f", about {duration(each * passes * (repeats - repeat))} left"
        tell({"kind": "progress", "message": f"order {repeat + 1} of {repeats}{left}"})
        scores.append(_scores(network, task, feed, repeat, device, opened.facts.threshold))
    ranked = _ranked(scores, pixels.bands or tuple(range(1, pixels.channels + 1)))
    result = Importance(
        metric=f"{split}/{task.headline}",
        value=scores[0]["all"],
        bands=ranked,
        rows=dataset.manifest.splits[split],
        repeats=repeats,
        bundle=opened.uri,
        dataset=storage.without_secrets(dataset.uri),
        fingerprint=dataset.manifest.fingerprint,
        chart=storage.join(storage.absolute(to), "bands.png") if to else None,
    )
    if result.chart:
        from scalecv.tasks.band_chart import bands_png

        rows_of_chart = [(f"band {b.band}", b.permuted, b.permuted_se, b.at_mean) for b in ranked]
        storage.put(result.chart, bands_png(rows_of_chart, result.metric, result.value))
    return result


def _scores(
    network: "torch.nn.Module", task: "Task", feed: "Feed", repeat: int, device: "torch.device", threshold: float
) -> dict[str, float]:
    """The headline metric of one order: of all bands, and by name without each; `at_mean` in the first order alone."""
    import torch

    from scalecv.batches.collate import to_device
    from scalecv.metrics.sums import add

    sums: dict[str, dict[str, torch.Tensor]] = {}
    donor = None
    with torch.no_grad():
        for _, raw in feed.epoch(repeat):
            given = to_device(raw, feed.pixels, device, channels_last=False)
            kept: dict[str, Any] = {key: given[key][given["valid"]] for key in ("mask", "label") if key in given}
            image = given["image"][given["valid"]]
            kept["valid"] = torch.ones(len(image), dtype=torch.bool, device=device)
            other = image.roll(1, 0) if len(image) > 1 or donor is None else donor
            donor = image[-1:].clone()
            for name, variant in _variants(image, other, with_mean=repeat == 0):
                add(sums.setdefault(name, {}), task.score(network(variant).float(), kept))
    expected = feed.dataset.manifest.splits[feed.split]
    if any(int(one["rows"]) != expected for one in sums.values()):
        raise RuntimeError(f"other rows of {feed.split} were scored than the {expected} that the manifest lists")
    return {name: task.summarise(one, feed.pixels.classes, threshold)[task.headline] for name, one in sums.items()}


def _variants(image: "torch.Tensor", other: "torch.Tensor", *, with_mean: bool) -> "Iterator[tuple[str, torch.Tensor]]":
    """Normalised images [B, C, H, W] by name: as they are, and with each band of another row, or at its mean."""
    yield "all", image
    for band in range(image.shape[1]):
        changed = image.clone()
        changed[:, band] = other[:, band]
        yield f"permuted {band}", changed
        if with_mean:
            changed = image.clone()
            changed[:, band] = 0.0
            yield f"at_mean {band}", changed


def _ranked(scores: list[dict[str, float]], bands: tuple[int, ...]) -> tuple[Band, ...]:
    from statistics import mean, stdev

    found = []
    for place, band in enumerate(bands):
        lost = [one["all"] - one[f"permuted {place}"] for one in scores]
        error = stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else float("nan")
        at_mean = scores[0]["all"] - scores[0][f"at_mean {place}"]
        found.append(Band(band, mean(lost), error, at_mean))
    return tuple(sorted(found, key=lambda one: (-one.permuted, -one.at_mean, one.band)))
