"""Score a model on every row of a split, once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from scalecv.batches.collate import to_device
from scalecv.batches.feed import Feed
from scalecv.batches.plan import order_sum
from scalecv.config import Loss
from scalecv.metrics.sums import add, over_ranks
from scalecv.models.losses import weighted
from scalecv.tasks.pictures import Sample, to_rgb
from scalecv.tasks.task import Task


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
    each: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sums of a task's score and of the weighted loss over every row of a feed's split; `each` follows each batch.

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
    """Hold on to the first rows and to those with the highest loss."""
    losses = torch.where(batch["valid"], per_sample, -torch.inf).cpu()
    bar = out.worst[-1][0] if len(out.worst) >= count else -torch.inf
    wanted = set(torch.nonzero(losses > bar).flatten().tolist())
    room = max(0, count - len(out.first))
    fixed = [at for at in range(len(losses)) if bool(batch["valid"][at])][:room]
    if not wanted and not fixed:
        return
    prediction, probability = (t.cpu() for t in task.predict(logits))
    truth = batch[task.target].cpu()
    for at in sorted(wanted | set(fixed)):
        sample = Sample(
            image=to_rgb(raw["image"][at].numpy()),
            truth=truth[at].numpy(),
            prediction=prediction[at].numpy(),
            probability=probability[at].numpy(),
            id=raw["id"][at],
            path=raw["path"][at],
        )
        if at in fixed:
            out.first.append(sample)
        if at in wanted:
            out.worst.append((float(losses[at]), sample))
    out.worst = sorted(out.worst, key=lambda pair: -pair[0])[:count]


def gather(out: Evaluation, count: int) -> Evaluation:
    """The samples of all ranks, on every rank: the first of each in turn, and the worst of all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return out
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (out.first, out.worst))
    first = [sample for rank in everyone for sample in rank[0]][:count]
    worst = sorted((pair for rank in everyone for pair in rank[1]), key=lambda pair: -pair[0])[:count]
    return replace(out, first=first, worst=worst)
