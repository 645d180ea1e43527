"""Metrics of sums over rows, for any number of sets of rows at once; numpy alone, and the same numbers as in training.

What a row adds is D numbers. Of K classes: D = 3 K, the pixels (or rows) that were hit, that are of the class, and that
were called so, class by class. Of images compared with a larger truth: D = 2, the value and 1, or 0 and 0 where the
image has no data. What is 0/0 is 0.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Floats]
"""Sums float64 [..., D] -> a number for each, float64 [...]."""

FIDELITY = ("psnr", "ssim")
OVERALL = ("accuracy", "macro_accuracy", "f1", "iou", "precision", "recall")
BY_CLASS = ("recall", "iou")


def metrics_of(task: str, classes: Sequence[str]) -> dict[str, Metric]:
    """The metrics that sums of rows give, by name.

    Args:
        task: classify, segment or upscale.
        classes: names as metrics carry them; the second is the foreground where segmentation has two.
    """
    if task == "upscale":
        return dict.fromkeys(FIDELITY, _mean)
    is_binary = task == "segment" and len(classes) == 2
    names = [name for name in OVERALL if (name != "iou" or task == "segment") and (name not in _ONE or is_binary)]
    found = {name: _of_classes(name, 1 if is_binary else None) for name in names}
    name_of_one = "iou" if task == "segment" else "recall"
    return found | {f"{name_of_one}_{name}": _of_classes(name_of_one, at) for at, name in enumerate(classes)}


_ONE = ("precision", "recall")


def _mean(sums: Floats) -> Floats:
    return _ratio(sums[..., 0], sums[..., 1])


def _of_classes(name: str, place: int | None) -> Metric:
    """A metric of all classes, or of the one at a place where it is of single ones."""

    def measure(sums: Floats) -> Floats:
        hit, true, called = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
        if name == "accuracy":
            return _ratio(hit.sum(-1), true.sum(-1))
        above, below = {
            "macro_accuracy": (hit, true),
            "recall": (hit, true),
            "precision": (hit, called),
            "f1": (2 * hit, true + called),
            "iou": (hit, true + called - hit),
        }[name]
        each = _ratio(above, below)
        if place is not None and name != "macro_accuracy":
            return each[..., place]
        seen = (true if name == "macro_accuracy" else true + called) > 0
        return _ratio((each * seen).sum(-1), seen.sum(-1))

    return measure


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=below > 0)
