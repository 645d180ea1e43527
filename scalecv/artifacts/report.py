"""Pictures and tables of an evaluation, as files on storage."""

import csv
import io
from typing import Any

from scalecv import storage
from scalecv.tasks import pictures
from scalecv.tasks.evaluate import Evaluation
from scalecv.tasks.task import Task

Event = dict[str, Any]


def draw(task: Task, checked: Evaluation, classes: tuple[str, ...], to: str, split: str, step: int) -> list[Event]:
    """Write the pictures and tables of an evaluation below a folder; the events that name them for the tracker."""
    files: dict[str, bytes] = {}
    images: dict[str, bytes] = {}
    if "confusion" in checked.sums:
        matrix = checked.sums["confusion"].cpu().numpy()
        files["confusion.png"] = images["confusion"] = pictures.confusion_png(matrix, classes)
        files["per_class.csv"] = pictures.per_class_csv(matrix, classes)
    drawn = task.draw or (lambda samples, names, title: pictures.predictions_png(samples, names, task.name, title))
    if checked.first:
        images["predictions"] = drawn(checked.first, classes, f"{split}: first rows")
    if checked.worst:
        worst = [sample for _, sample in checked.worst]
        images["worst"] = drawn(worst, classes, f"{split}: highest loss")
        files["worst.csv"] = _worst_csv(checked, classes)
    events: list[Event] = []
    for name, data in {**files, **{f"{key}.png": data for key, data in images.items()}}.items():
        uri = storage.join(to, "pictures", split, name)
        storage.put(uri, data)
        events.append({"kind": "artifact", "uri": uri, "folder": f"pictures/{split}"})
    events += [
        {
            "kind": "image",
            "uri": storage.join(to, "pictures", split, f"{key}.png"),
            "key": f"{split}/{key}",
            "step": step,
        }
        for key in images
    ]
    return events


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
