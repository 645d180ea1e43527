"""From which probability on two classes are told as the second: fixed, or tuned on the validation split at the end.

While training goes on, validation tells classes apart at the fixed threshold or at 0.5: the curves of epochs, early
stopping and the choice of the best weights then compare weights, not thresholds. The tuned one comes from the counts of
the one validation that is made of the best weights anyway (see metrics.binned). The epoch that made them foresees it,
so that what each row adds to the metrics can be kept at it.
"""

from typing import TYPE_CHECKING

from scalecv.config import Train
from scalecv.metrics import binned
from scalecv.tasks.task import Task

if TYPE_CHECKING:
    from scalecv.tasks.evaluate import Evaluation

TUNED = "val/tuned_threshold"
"""Metric of an epoch: what `chosen` says of its weights, where that is not `fixed`."""


def fixed(train: Train) -> float:
    """The threshold of validations while training goes on."""
    return binned.on_grid(train.threshold) if isinstance(train.threshold, float) else 0.5


def chosen(train: Train, task: Task, checked: "Evaluation | None") -> float:
    """The threshold of a model.

    Args:
        train: of the experiment.
        task: of the experiment.
        checked: the model on the validation split; None where there is none.
    """
    wanted = train.threshold == "tuned" or (train.threshold is None and task.tuned)
    if not wanted or checked is None or "probabilities" not in checked.sums:
        return fixed(train)
    return binned.best_threshold(checked.sums["probabilities"], task.headline)
