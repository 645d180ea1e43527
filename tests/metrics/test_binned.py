"""Numbers from counts of probabilities: exact at each threshold, and as near to scikit-learn as the bins are fine."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from scalecv.metrics import binned
from scalecv.schema import IGNORE


def drawn(pixels=20_000, share=0.03):
    truth = (torch.rand(pixels) < share).long()
    return torch.sigmoid(torch.randn(pixels) * 1.5 - 3 + 4 * truth), truth


def counted(p, truth):
    return binned.counts(p.view(1, -1), truth.view(1, -1), torch.tensor([True]))


def test_counts_by_hand_and_what_counts_nowhere():
    p = torch.tensor([[0.0, 1.0, 0.5, 0.5 - 2**-13], [float("nan"), 0.25, 0.25, 0.25]])
    truth = torch.tensor([[0, 1, 1, 0], [0, 1, IGNORE, 0]])
    found = binned.counts(p, truth, torch.tensor([True, True]))
    assert found.dtype == torch.int64 and found.shape == (2, binned.BINS)
    quarter, half = binned.place(0.25), binned.place(0.5)
    last = [1, binned.BINS - 1]
    assert found.nonzero().tolist() == [[0, 0], [0, quarter], [0, half - 1], [1, quarter], [1, half], last]
    assert found[0, 0] == 2 and found.sum() == 7
    assert binned.counts(p, truth, torch.tensor([True, False])).sum() == 4
    with pytest.raises(ValueError, match="outside"):
        binned.counts(p, torch.full_like(truth, 2), torch.tensor([True, True]))


@pytest.mark.parametrize("threshold", [1e-9, 1 / 4096, 0.25, 0.3, 0.5, 0.75, 4095 / 4096, 1 - 2**-24])
def test_the_matrix_at_a_threshold_is_that_of_the_predictions(threshold):
    p, truth = drawn()
    p[:50] = threshold  # on the edge itself
    threshold = binned.on_grid(threshold)
    matrix = binned.confusion_at(counted(p, truth), threshold)
    said = p >= threshold
    expected = [[int(((truth == t) & (said == s)).sum()) for s in (0, 1)] for t in (0, 1)]
    assert matrix.tolist() == expected
    found = binned.curve(counted(p, truth))
    at = binned.place(threshold)
    assert float(found.threshold[at]) == threshold
    assert float(found.f1[at]) == pytest.approx(f1_score(truth.numpy(), said.numpy(), zero_division=0))
    assert float(found.accuracy[at]) == pytest.approx(float((truth == said).double().mean()))
    assert float(found.iou[at]) == pytest.approx(expected[1][1] / max(1, sum(expected[1]) + expected[0][1]))


def test_average_precision_lies_within_what_the_order_in_a_bin_can_change():
    p, truth = drawn()
    bins, found = binned.bins(p).numpy(), binned.average_precision(counted(p, truth))
    truth = truth.numpy()
    exact = average_precision_score(truth, p.numpy())
    assert found == pytest.approx(average_precision_score(truth, bins), abs=1e-12)  # ties of a bin, else nothing
    # Within each bin positives last, or first: no order of the same bins is worse, or better.
    low, high = (average_precision_score(truth, bins + 0.5 * (truth == first)) for first in (0, 1))
    assert low <= exact <= high and low - 1e-12 <= found <= high
    assert high - low < 0.01 and abs(found - exact) < 1e-3


def test_edges_are_numbers_of_float32_that_every_coarser_threshold_is_among():
    assert torch.equal(binned.EDGES.float().double(), binned.EDGES) and float(binned.EDGES[-1]) == 1 - 2**-24
    assert {step / 4096 for step in range(4096)} <= set(binned.EDGES.tolist())


@pytest.mark.parametrize("far", [12.0, -20.0])
def test_a_network_that_is_sure_of_everything_is_still_ranked_and_told_apart(far):
    """All logits lie far from zero: positives a little above negatives."""
    truth = (torch.rand(20_000) < 0.2).long()
    p = torch.sigmoid(far + 0.5 * torch.randn(20_000) + 2 * truth)
    found = counted(p, truth)
    assert binned.average_precision(found) == pytest.approx(average_precision_score(truth, p), abs=5e-3)
    best = binned.best_threshold(found, "f1")
    every = [f1_score(truth, p >= at) for at in torch.sigmoid(torch.linspace(far - 1, far + 3, 80))]
    assert f1_score(truth, p >= best) > max(every) - 5e-3


def test_numbers_of_nothing_are_zero():
    nothing = torch.zeros(2, binned.BINS, dtype=torch.int64)
    assert binned.average_precision(nothing) == binned.calibration_error(nothing) == 0.0
    assert binned.best_threshold(nothing, "f1") == 0.5


def test_the_best_threshold_is_the_best_of_all():
    p, truth = drawn()
    best = binned.best_threshold(counted(p, truth), "iou")
    every = [f1_score(truth.numpy(), p.numpy() >= at, zero_division=0) for at in (best, *np.arange(0.05, 1, 0.05))]
    assert max(every) == every[0]
    assert best == binned.best_threshold(counted(p, truth), "f1")  # F1 and IoU rise and fall together
    sure = torch.tensor([0.1, 0.2, 0.9])
    assert binned.best_threshold(counted(sure, torch.tensor([0, 0, 1])), "iou") == 0.5  # any between is as good


def test_calibration_of_probabilities_that_are_true_and_of_others():
    p = torch.rand(400_000)
    true = (torch.rand(400_000) < p).long()
    assert binned.calibration_error(counted(p, true)) < 0.01
    assert binned.calibration_error(counted(torch.full((1000,), 0.9), torch.zeros(1000).long())) == pytest.approx(
        0.9, abs=2e-4
    )
    said, share, total = binned.calibration(counted(p, true))
    assert total.sum() == 400_000 and np.allclose(said, (torch.arange(16) + 0.5) / 16, atol=0.01)
    assert np.allclose(share, said, atol=0.02)


def test_tiles_without_foreground_by_their_highest_probability():
    p = torch.tensor([[[0.1, 0.7]], [[0.2, 0.9]], [[0.3, 0.9]], [[0.9, 0.9]], [[0.5, 0.5]]])
    truth = torch.tensor([[[0, 0]], [[0, 1]], [[0, IGNORE]], [[IGNORE, IGNORE]], [[0, 0]]])
    found = binned.highest_of_empty(p, truth, torch.tensor([True, True, True, True, False]))
    assert found.nonzero().flatten().tolist() == binned.bins(torch.tensor([0.3, 0.7])).tolist() and found.sum() == 2
