"""Pictures and tables of an evaluation, as files on storage."""

import csv
import io
from typing import Any

import torch

from scalecv import storage
from scalecv.metrics import confusion as numbers
from scalecv.tasks import pictures
from scalecv.tasks.curves import curves_of_two
from scalecv.tasks.evaluate import Evaluation
from scalecv.tasks.task import Task

Event = dict[str, Any]


def draw(
    task: Task, checked: Evaluation, classes: tuple[str, ...], to: str, split: str, step: int, key: str = ""
) -> list[Event]:
    """Write the pictures and tables of an evaluation below a folder; the events that name them for the tracker.

    Args:
        task: of the model.
        checked: what is shown.
        classes: their names.
        to: folder.
        split: that was scored.
        step: of the tracker's pictures.
        key: what their names begin with there; empty takes the split.
    """
    files: dict[str, bytes] = {}
    images: dict[str, bytes] = {}
    if "confusion" in checked.sums:
        matrix = checked.sums["confusion"].cpu().numpy()
        files["per_class.csv"] = pictures.per_class_csv(matrix, classes)
        headline = numbers.mean_iou(torch.from_numpy(matrix)) if task.headline == "iou" else None
        images["confusion"] = pictures.confusion_png(matrix, classes, iou=headline)
    images |= _images(task, checked, classes, split)
    if checked.worst:
        files["worst.csv"] = _worst_csv(checked, classes)
    events: list[Event] = []
    where = storage.join(to, "pictures", split)
    for name, data in {**files, **{f"{name}.png": data for name, data in images.items()}}.items():
        uri = storage.join(where, name)
        storage.put(uri, data)
        events.append({"kind": "artifact", "uri": uri, "folder": f"pictures/{split}"})
    return events + [_named(where, name, key or split, step) for name in images]


def draw_epoch(
    task: Task, checked: Evaluation, classes: tuple[str, ...], run: str, split: str, updates: int
) -> list[Event]:
    """Write the pictures of one validation below a run; the events that name them by key and step."""
    where = storage.join(run, "pictures", split, f"{updates:08d}")
    images = _images(task, checked, classes, f"{split} after {updates:,} updates")
    for name, data in images.items():
        storage.put(storage.join(where, f"{name}.png"), data)
    return [_named(where, name, split, updates) for name in images]


def _images(task: Task, checked: Evaluation, classes: tuple[str, ...], title: str) -> dict[str, bytes]:
    """Samples, and for two classes what the threshold does."""
    images: dict[str, bytes] = {}
    worst, best = ([sample for _, sample in pairs] for pairs in (checked.worst, checked.best))
    shown = {"predictions": (checked.first, "first rows"), "worst": (worst, "highest loss")}
    if task.target == "mask":
        shown["best"] = (best, "lowest loss, with foreground")
    drawn = task.draw or (lambda samples, names, title: pictures.predictions_png(samples, names, task.name, title))
    for name, (samples, what) in shown.items():
        if samples:
            images[name] = drawn(samples, classes, f"{title}: {what}")
    if "probabilities" in checked.sums:
        images |= curves_of_two(checked.sums["probabilities"], checked.threshold, title)
    return images


def _named(where: str, name: str, key: str, step: int) -> Event:
    return {"kind": "image", "uri": storage.join(where, f"{name}.png"), "key": f"{key}/{name}", "step": step}


def _worst_csv(checked: Evaluation, classes: tuple[str, ...]) -> bytes:
    """The samples with the highest loss, by path in the source; truth and prediction where they are one class."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["path", "id", "loss", "truth", "prediction", "probability"])
    for loss, sample in checked.worst:
        said: list[object] = ["", "", ""]
        if sample.truth.ndim == 0:
            truth, guess = int(sample.truth), int(sample.prediction)
            said = [classes[truth], classes[guess], f"{float(sample.probability[guess]):.4f}"]
        table.writerow([sample.path, sample.id, f"{loss:.6g}", *said])
    return out.getvalue().encode()
