"""Two processes joined by gloo score what one does: every number, the threshold, and the samples that are shown."""

import numpy as np
import torch

from scalecv.metrics import binned
from scalecv.metrics.sums import over_ranks
from scalecv.schema import IGNORE
from scalecv.tasks.evaluate import Evaluation, gather
from scalecv.tasks.pictures import Sample
from scalecv.tasks.segment import SEGMENT
from tests.pair import on_two_ranks

ROWS, KEPT = 12, 4


def scored(rows):
    """Sums and samples of some of twelve tiles; a third of them are empty."""
    draw = torch.Generator().manual_seed(1)
    logits, mask = torch.randn(ROWS, 1, 16, 16, generator=draw), torch.zeros(ROWS, 16, 16, dtype=torch.long)
    mask[::3, 4:9, 4:9], mask[1::3, :3], mask[:, -1] = 1, 1, IGNORE
    logits += 2 * (mask == 1).unsqueeze(1) - 1
    sums = SEGMENT.score(logits[rows], {"mask": mask[rows], "valid": torch.ones(len(rows), dtype=torch.bool)})
    losses = [(float(logits[row].max()), Sample(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1), f"{row}"))
              for row in rows]  # fmt: skip
    found = Evaluation(over_ranks(sums), len(rows), first=[sample for _, sample in losses][:KEPT])
    found.worst = sorted(losses, key=lambda pair: -pair[0])[:KEPT]
    found.best = sorted(losses, key=lambda pair: pair[0])[:KEPT]
    found = gather(found, KEPT)
    threshold = binned.best_threshold(found.sums["probabilities"], "iou")
    shown = [[sample.id for sample in found.first], *([s.id for _, s in kept] for kept in (found.worst, found.best))]
    return threshold, SEGMENT.summarise(found.sums, ["background", "roof"], threshold), shown


def of_rank(rank):
    return scored(list(range(6 * rank, 6 * rank + 6)))


def test_two_ranks_say_what_one_does(tmp_path):
    found = on_two_ranks(of_rank, tmp_path)
    alone = scored(list(range(ROWS)))
    assert found == [alone, alone] and alone[0] != 0.5 and alone[1]["false_alarm_tiles"] > 0
