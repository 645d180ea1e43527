"""One class per image."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scalecv.config import Loss
from scalecv.metrics import confusion as numbers
from scalecv.tasks.task import Batch, Task, active_terms, refuse, refuse_images
from scalecv.tasks.tell import each_class


def default_loss(classes: int) -> dict[str, float]:
    """Cross-entropy."""
    return {"cross_entropy": 1.0}


def outputs(classes: int, channels: int = 0) -> int:
    """One logit per class."""
    return classes


def check(loss: Loss, classes: int) -> None:
    """Raises: ConfigError: a term for pixels, or one for two classes where there are more."""
    refuse_images(loss)
    for term in ("dice", "jaccard"):
        refuse(loss, term, "compares areas, so it is for task=segment; use loss.cross_entropy")
    if classes != 2:
        refuse(loss, "bce", f"is for two classes, the dataset has {classes}; use loss.cross_entropy")


def losses(logits: Tensor, batch: Batch, loss: Loss, class_weights: Tensor | None) -> dict[str, Tensor]:
    """The active terms, float32 [B] each."""
    names = list(loss.terms() or default_loss(logits.shape[1]))
    return active_terms(logits, batch, batch["label"], names, loss, class_weights)


def score(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Confusion int64 [K, K] and the number of valid rows."""
    prediction = logits.detach().argmax(1)
    matrix = numbers.confusion(prediction, batch["label"], logits.shape[1], batch["valid"])
    return {"confusion": matrix, "rows": batch["valid"].sum()}


def summarise(sums: Mapping[str, Tensor], classes: Sequence[str]) -> dict[str, float]:
    """accuracy, macro_accuracy, f1 (macro), and recall_NAME of up to 20 classes."""
    matrix = sums["confusion"].cpu()
    return {
        "accuracy": numbers.accuracy(matrix),
        "macro_accuracy": numbers.macro_accuracy(matrix),
        "f1": numbers.macro_f1(matrix),
        **each_class("recall", numbers.per_class(matrix)["recall"], classes),
    }


def predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class int64 [B] and probability float32 [B, K]."""
    probability = torch.softmax(logits.float(), 1)
    return probability.argmax(1), probability


CLASSIFY = Task(
    name="classify",
    headline="accuracy",
    target="label",
    default_loss=default_loss,
    outputs=outputs,
    check=check,
    losses=losses,
    score=score,
    summarise=summarise,
    predict=predict,
)
