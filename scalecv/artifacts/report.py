"""Pictures and tables of an evaluation, as files on storage."""

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
    matrix = checked.sums["confusion"].cpu().numpy()
    files["confusion.png"] = images["confusion"] = pictures.confusion_png(matrix, classes)
    files["per_class.csv"] = pictures.per_class_csv(matrix, classes)
    if checked.first:
        images["predictions"] = pictures.predictions_png(checked.first, classes, task.name, f"{split}: first rows")
    if checked.worst:
        worst = [sample for _, sample in checked.worst]
        images["worst"] = pictures.predictions_png(worst, classes, task.name, f"{split}: highest loss")
        lines = ["id,loss"] + [f"{sample.id},{loss:.6g}" for loss, sample in checked.worst]
        files["worst.csv"] = ("\n".join(lines) + "\n").encode()
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
