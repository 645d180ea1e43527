"""One class per image."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scalecv.config import Loss
from scalecv.metrics import binned
from scalecv.metrics import confusion as numbers
from scalecv.tasks.task import Batch, Task, active_terms, refuse, refuse_images, two_classes_alone
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
    for term in ("dice", "jaccard", "tversky", "lovasz", "pos_neg_iou"):
        refuse(loss, term, "compares areas, so it is for task=segment; use loss.cross_entropy")
    two_classes_alone(loss, classes, ("bce",))


def losses(logits: Tensor, batch: Batch, loss: Loss, class_weights: Tensor | None) -> dict[str, Tensor]:
    """The active terms, float32 [B] each."""
    names = list(loss.terms() or default_loss(logits.shape[1]))
    return active_terms(logits, batch, batch["label"], names, loss, class_weights)


def score(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Confusion int64 [K, K] and the number of valid rows; two classes: also probabilities int64 [2, BINS]."""
    label, valid, rows = batch["label"], batch["valid"], batch["valid"].sum()
    if logits.shape[1] != 2:
        return {"confusion": numbers.confusion(logits.detach().argmax(1), label, logits.shape[1], valid), "rows": rows}
    probabilities = binned.counts(torch.softmax(logits.detach().float(), 1)[:, 1], label, valid)
    return {"confusion": binned.confusion_at(probabilities, 0.5), "probabilities": probabilities, "rows": rows}


def summarise(sums: Mapping[str, Tensor], classes: Sequence[str], threshold: float = 0.5) -> dict[str, float]:
    """accuracy, macro_accuracy, f1 (macro), and recall_NAME of up to 20 classes.

    Two classes: also average_precision and calibration_error, and the others at the threshold.
    """
    two = sums["probabilities"].cpu() if "probabilities" in sums else None
    matrix = sums["confusion"].cpu() if two is None else binned.confusion_at(two, threshold)
    return {
        "accuracy": numbers.accuracy(matrix),
        "macro_accuracy": numbers.macro_accuracy(matrix),
        "f1": numbers.macro_f1(matrix),
        **each_class("recall", numbers.per_class(matrix)["recall"], classes),
        **({} if two is None else _of_two(two)),
    }


def _of_two(probabilities: Tensor) -> dict[str, float]:
    return {
        "average_precision": binned.average_precision(probabilities),
        "calibration_error": binned.calibration_error(probabilities),
    }


def predict(logits: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Class int64 [B] and probability float32 [B, K]; of two classes the second from the threshold on."""
    probability = torch.softmax(logits.float(), 1)
    if logits.shape[1] == 2:
        return (probability[:, 1] >= threshold).long(), probability
    return probability.argmax(1), probability


def rows(logits: Tensor, batch: Batch, threshold: float = 0.5) -> dict[str, Tensor]:
    """The label int64 [B], the prediction int64 [B], and the probability of the label float32 [B]."""
    prediction, probability = predict(logits.detach(), threshold)
    label = batch["label"]
    return {"label": label, "prediction": prediction, "probability": probability.gather(1, label[:, None])[:, 0]}


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
    rows=rows,
    tuned=False,
)
