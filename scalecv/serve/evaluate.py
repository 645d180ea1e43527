"""`scalecv evaluate MODEL DATASET`: score a bundle on every row of a split, once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from scalecv import storage
from scalecv.artifacts import bundle, report, tracking
from scalecv.config import Loss
from scalecv.errors import DataError, nearest
from scalecv.shards.manifest import Manifest
from scalecv.shards.store import open_dataset

if TYPE_CHECKING:
    from scalecv.batches.pixels import Pixels

Event = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What an evaluation found."""

    run_id: str | None
    """MLflow run that the model came from, where it was named by one."""
    status: str
    metrics: dict[str, float]
    rows: int
    weights_hash: str
    bundle: str
    dataset: str
    version: int
    fingerprint: str
    split: str
    pictures: str | None
    """Where the pictures and tables lie."""
    images_per_s: float
    data_wait_share: float
    order_hash: str
    threshold: float
    """Probability from which on two classes were told as the second, as the bundle says; 0.5 for more classes."""


def evaluate(
    model: str,
    dataset_uri: str,
    *,
    split: str = "test",
    version: int | None = None,
    batch: int = 64,
    to: str | None = None,
    allow_import: bool = False,
    tell: Callable[[Event], None] = lambda _: None,
) -> Result:
    """Score a model on a split of a dataset.

    Args:
        model: bundle folder, runs:/ID or models:/NAME@ALIAS.
        dataset_uri: what `scalecv ingest` wrote.
        split: train, val or test.
        version: version of the dataset; None takes the newest.
        batch: images at a time.
        to: folder for pictures, tables, and what each row adds to the metrics (see artifacts.scores); None writes none.
        allow_import: let a bundle whose network is the user's own function import it.
        tell: called with progress events.
    Raises: DataError: the dataset does not fit the model: bands, kind or classes.
    """
    import os
    import time

    import torch

    from scalecv.artifacts import scores
    from scalecv.batches.feed import Feed
    from scalecv.batches.plan import order_hash
    from scalecv.tasks import evaluate as scoring
    from scalecv.tasks import task_for
    from scalecv.tasks.rows import RowSums

    opened = bundle.open_bundle(tracking.lookup(model), allow_import=allow_import)
    dataset = open_dataset(dataset_uri, version)
    check(opened, dataset.manifest, dataset_uri, split)
    pixels = pixels_for(opened, dataset.manifest)
    task = task_for(opened.facts.task, pixels, opened.facts.call.arch, opened.facts.call.args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    feed = Feed(dataset, split, pixels, batch, threads=os.cpu_count() or 1)
    tell({"kind": "progress", "message": f"scoring {dataset.manifest.splits[split]:,} rows of {split} on {device}"})
    began = time.perf_counter()
    loss = Loss.model_validate(opened.facts.loss)
    rows = RowSums(task, dataset.manifest.splits[split], opened.facts.threshold)
    checked = scoring.evaluate(
        opened.model.to(device),
        task,
        feed,
        device,
        loss=loss,
        pictures=16 if to else 0,
        rows=rows if to else None,
    ).at(opened.facts.threshold)
    took = time.perf_counter() - began
    named = task.summarise(checked.sums, opened.facts.classes, checked.threshold)
    metrics = {f"{split}/{name}": value for name, value in named.items()}
    metrics[f"{split}/loss"] = float(checked.sums["loss"].item()) / max(1, checked.rows)
    if to:
        about = scores.About(
            task=task.name,
            split=split,
            fingerprint=dataset.manifest.fingerprint,
            rows=checked.rows,
            classes=opened.facts.classes,
            threshold=checked.threshold,
            weights_hash=opened.facts.weights_hash,
        )
        scores.write(rows, about, storage.absolute(to))
        report.draw(task, checked, opened.facts.classes, storage.absolute(to), split, step=0)
    return Result(
        run_id=model.removeprefix("runs:/").partition("/")[0] if model.startswith("runs:/") else None,
        status="finished",
        metrics=metrics,
        rows=checked.rows,
        weights_hash=opened.facts.weights_hash,
        bundle=opened.uri,
        dataset=storage.without_secrets(dataset.uri),
        version=dataset.version,
        fingerprint=dataset.manifest.fingerprint,
        split=split,
        pictures=storage.absolute(to) if to else None,
        images_per_s=checked.rows / max(took, 1e-9),
        data_wait_share=checked.wait_s / max(took, 1e-9),
        order_hash=order_hash(checked.order_total),
        threshold=checked.threshold,
    )


def pixels_for(opened: bundle.Bundle, manifest: Manifest) -> "Pixels":
    """How rows of a dataset become the model's input: as in training, but what counts nowhere in masks is its own."""
    return replace(opened.pixels(), mask_ignore=manifest.mask_ignore)


def check(opened: bundle.Bundle, manifest: Manifest, where: str, split: str) -> None:
    """See that a model can score a split of a dataset.

    Raises: DataError: bands, kind, classes or split do not fit.
    """
    facts = opened.facts
    kind = {"classify": "label", "segment": "mask"}.get(facts.task)
    if kind and manifest.kind != kind:
        raise DataError(
            f"{opened.uri} is a model for task={facts.task}, {where} has rows with a {manifest.kind}, not a {kind}"
        )
    if not manifest.splits.get(split):
        known = [name for name, rows in manifest.splits.items() if rows]
        raise DataError(f"{where} has no split '{split}'{nearest(split, known)}; it has {', '.join(known)}")
    strange = [c for c in manifest.class_counts.get(split, {}) if c not in facts.classes]
    if kind and strange:
        raise DataError(
            f"{where}: {split} has classes that the model does not know: {', '.join(strange[:5])}; it knows "
            f"{', '.join(facts.classes[:8])}{' …' if len(facts.classes) > 8 else ''}"
        )
    if kind == "mask" and manifest.mask_values != facts.pixels.mask_values:
        raise DataError(
            f"{where} has the mask values {list(manifest.mask_values)}, the model was trained on "
            f"{list(facts.pixels.mask_values)}: ingest it with --mask-values"
        )
    each = zip(facts.pixels.mask_values, manifest.classes, facts.classes, strict=False)
    other = [(value, name, known) for value, name, known in each if name != known]
    if kind == "mask" and other:
        value, name, trained = other[0]
        raise DataError(
            f"{where} names the mask value {value} {name}, the model was trained with it as {trained}: ingest it with "
            f"--mask-values {','.join(map(str, facts.pixels.mask_values))} --classes {','.join(facts.classes)}, if the "
            "masks mean that"
        )
    strange_dtypes = {seen.partition("x")[0] for seen in manifest.band_counts} - {facts.pixels.source_dtype}
    if facts.pixels.color == "native" and strange_dtypes:
        raise DataError(
            f"{where} holds {', '.join(sorted(strange_dtypes))} images, the model was trained on "
            f"{facts.pixels.source_dtype}: values would mean something else"
        )
    if facts.pixels.size_px is None and manifest.sizes_px[:2] != manifest.sizes_px[2:]:
        raise DataError(f"{where} holds images of several sizes, and the model was trained without data.size_px")
    if facts.pixels.size_px is None:
        _sides(facts, manifest, where)
    if facts.pixels.color == "native":
        bands = facts.pixels.bands
        needed = max(bands) if bands else facts.pixels.channels
        for seen in manifest.band_counts:
            count = int(seen.partition("x")[2])
            if count < needed or (bands is None and count != needed):
                raise DataError(f"{where} holds images with {count} bands, the model was trained on {needed}")


def _sides(facts: bundle.Facts, manifest: Manifest, where: str) -> None:
    """Raises: DataError: the stride of the network does not divide the images' sides."""
    from scalecv.models import misfit

    for one in (member for member in facts.members or (facts,) if getattr(member, "scale", (1.0, 1.0)) == (1.0, 1.0)):
        call, factor = one.call, one.upscale.factor if one.upscale else 1
        wrong = misfit(facts.task, call.arch, call.encoder, call.args, manifest.sizes_px[:2], factor)
        if wrong is not None:
            raise DataError(
                f"{where}: {wrong[0]}; it was trained without data.size_px, which would resize them: ingest images of "
                f"another size, such as with --tile {wrong[1]}, or take a model that was trained with data.size_px"
            )
