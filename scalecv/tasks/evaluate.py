"""Score a model on every row of a split, once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray

from scalecv.batches.collate import to_device
from scalecv.batches.feed import Feed
from scalecv.batches.plan import order_sum
from scalecv.config import Loss
from scalecv.metrics.binned import confusion_at
from scalecv.metrics.sums import add, everywhere, over_ranks
from scalecv.models.losses import weighted
from scalecv.tasks.pictures import Sample, to_rgb
from scalecv.tasks.rows import RowSums
from scalecv.tasks.task import Task

MOST_PX = 256
"""Samples of masks keep fewer pixels where their longer side has twice as many or more."""


@dataclass
class Evaluation:
    """Sums over all rows of a split, and samples to look at (of this rank)."""

    sums: dict[str, torch.Tensor]
    rows: int
    order_total: int = 0
    """Sum of `plan.order_sum` over the rows (of this rank)."""
    wait_s: float = 0.0
    """Seconds that the model waited for batches (on this rank)."""
    first: list[Sample] = field(default_factory=list)
    """The first rows of the split."""
    worst: list[tuple[float, Sample]] = field(default_factory=list)
    """(loss, sample), highest loss first."""
    best: list[tuple[float, Sample]] = field(default_factory=list)
    """(loss, sample), lowest loss first; of masks only those with foreground."""
    threshold: float = 0.5
    """Probability from which on two classes are told as the second, in the confusion and the samples."""

    def at(self, threshold: float) -> "Evaluation":
        """The same with two classes told apart elsewhere; more classes stay as they are."""
        if "probabilities" not in self.sums:
            return self
        matrix = confusion_at(self.sums["probabilities"], threshold)
        return replace(
            self,
            sums={**self.sums, "confusion": matrix},
            first=[sample.at(threshold) for sample in self.first],
            worst=[(loss, sample.at(threshold)) for loss, sample in self.worst],
            best=[(loss, sample.at(threshold)) for loss, sample in self.best],
            threshold=threshold,
        )


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    task: Task,
    feed: Feed,
    device: torch.device,
    *,
    loss: Loss,
    class_weights: torch.Tensor | None = None,
    channels_last: bool = False,
    pictures: int = 0,
    rows: RowSums | None = None,
    each: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sums of a task's score and of the weighted loss over every row of a feed's split; `each` follows each batch.

    Into `rows` goes what each row of this rank adds to the metrics.

    Raises: RuntimeError: other rows were scored than the manifest lists; that would be our own error.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    out = Evaluation(sums, 0)
    classes = len(feed.pixels.classes)
    batches = feed.epoch(0)
    for _, raw in batches:
        batch = task.prepare(to_device(raw, feed.pixels, device, channels_last))
        logits = model(batch["image"]).float()
        terms = task.losses(logits, batch, loss, class_weights)
        per_sample = weighted(terms, loss.terms() or task.default_loss(classes))
        valid = batch["valid"]
        add(sums, task.score(logits, batch))
        add(sums, {"loss": (per_sample.double() * valid).sum(), "seen": valid.sum()})
        counts = raw["valid"].numpy()
        ids = [row for row, valid_row in zip(raw["id"], counts, strict=True) if valid_row]
        out.order_total += order_sum(raw["position"].numpy()[counts], ids, 0)
        if rows:
            rows.add(raw, batch, logits)
        if pictures:
            _keep(out, task, raw, batch, logits, per_sample, pictures)
        each()
    out.sums, out.wait_s = over_ranks(sums), batches.wait_s
    out.rows = int(out.sums["seen"].item())
    expected = feed.dataset.manifest.splits.get(feed.split, 0)
    if out.rows != expected:
        raise RuntimeError(f"{out.rows} rows of {feed.split} were scored, the manifest lists {expected}")
    model.train(was_training)
    return out


def _keep(
    out: Evaluation,
    task: Task,
    raw: Any,
    batch: dict[str, Any],
    logits: torch.Tensor,
    per_sample: torch.Tensor,
    count: int,
) -> None:
    """Hold on to the first rows, to those with the highest loss, and to those with the lowest."""
    losses = torch.where(batch["valid"], per_sample, -torch.inf).cpu()
    truth = batch[task.target].cpu()
    is_mask = truth.ndim == 3
    is_shown = (truth > 0).flatten(1).any(1) if is_mask else torch.ones_like(losses, dtype=torch.bool)
    gains = torch.where(is_shown & torch.isfinite(losses), -losses, -torch.inf)
    high = _beyond(losses, out.worst[-1][0] if len(out.worst) >= count else -torch.inf)
    low = _beyond(gains, -out.best[-1][0] if len(out.best) >= count else -torch.inf)
    room = max(0, count - len(out.first))
    fixed = [at for at in range(len(losses)) if bool(batch["valid"][at])][:room]
    if not high | low and not fixed:
        return
    prediction, probability = (t.cpu() for t in task.predict(logits))
    for at in sorted(high | low | set(fixed)):
        step = max(1, max(truth.shape[1:]) // MOST_PX) if is_mask else 1  # larger ones would be drawn smaller anyway
        sample = Sample(
            image=to_rgb(raw["image"][at].numpy()[:, ::step, ::step]),
            truth=_thinned(truth[at], step),
            prediction=_thinned(prediction[at], step),
            probability=_thinned(_shown(probability[at]) if is_mask else probability[at], step),
            id=raw["id"][at],
            path=raw["path"][at],
        )
        if at in fixed:
            out.first.append(sample)
        if at in high:
            out.worst.append((float(losses[at]), sample))
        if at in low:
            out.best.append((float(losses[at]), sample))
    out.worst = sorted(out.worst, key=lambda pair: -pair[0])[:count]
    out.best = sorted(out.best, key=lambda pair: pair[0])[:count]


def _beyond(values: torch.Tensor, bar: float) -> set[int]:
    return set(torch.nonzero(values > bar).flatten().tolist())


def _thinned(values: torch.Tensor, step: int) -> NDArray[Any]:
    """A copy of one number, of [K], or of every `step`-th row and column of [H, W]: batches share memory."""
    return (values[::step, ::step] if values.ndim == 2 else values).numpy().copy()


def _shown(probability: torch.Tensor) -> torch.Tensor:
    """What a sample keeps of float32 [K] or [K, H, W]: of pixels only one number each."""
    if probability.ndim == 1:
        return probability
    return probability[1] if len(probability) == 2 else probability.amax(0)


def gather(out: Evaluation, count: int) -> Evaluation:
    """The samples of all ranks, on every rank: the first of each in turn, the worst and the best of all.

    Losses go round before samples do: no rank sends more than what is among the `count` of all.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return out
    losses = everywhere(([pair[0] for pair in out.worst], [pair[0] for pair in out.best], len(out.first)))
    high = sorted((loss for rank in losses for loss in rank[0]), reverse=True)[:count]
    low = sorted(loss for rank in losses for loss in rank[1])[:count]
    room = max(0, count - sum(rank[2] for rank in losses[: torch.distributed.get_rank()]))
    mine = (
        out.first[:room],
        [pair for pair in out.worst if pair[0] >= high[-1]],
        [pair for pair in out.best if pair[0] <= low[-1]],
    )
    everyone = everywhere(mine)
    first = [sample for rank in everyone for sample in rank[0]][:count]
    worst = sorted((pair for rank in everyone for pair in rank[1]), key=lambda pair: -pair[0])[:count]
    best = sorted((pair for rank in everyone for pair in rank[2]), key=lambda pair: pair[0])[:count]
    return replace(out, first=first, worst=worst, best=best)
