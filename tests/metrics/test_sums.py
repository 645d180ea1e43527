"""Sums over batches and over processes."""

import torch

from scalecv.metrics.sums import add, over_ranks
from tests.pair import on_two_ranks


def test_add_grows_name_by_name():
    sums = {}
    first = {"rows": torch.tensor(2), "loss": torch.tensor(0.5)}
    add(sums, first)
    add(sums, {"rows": torch.tensor(3), "seen": torch.tensor(1)})
    assert {name: float(value) for name, value in sums.items()} == {"rows": 5, "loss": 0.5, "seen": 1}
    assert int(first["rows"]) == 2


def test_without_processes_they_stay_what_they_are():
    sums = {"b": torch.tensor([[2, 3]]), "a": torch.tensor(0.25), "c": torch.tensor(True)}
    out = over_ranks(sums)
    assert list(out) == ["b", "a", "c"]
    assert out["b"].tolist() == [[2, 3]] and out["b"].dtype == torch.int64
    assert out["a"].dtype == torch.float64 and int(out["c"]) == 1


def _sums_over_ranks(rank):
    big = 2**60 + rank  # would not survive float64
    sums = {"confusion": torch.tensor([[big, 1], [0, rank]]), "loss": torch.tensor(0.1 * (rank + 1))}
    # The names arrive in another order on each rank.
    out = over_ranks(sums if rank else dict(reversed(sums.items())))
    return out["confusion"].tolist(), float(out["loss"])


def test_two_processes_add_up_exactly(tmp_path):
    expected = float(torch.tensor(0.1).double() + torch.tensor(0.2).double())
    assert on_two_ranks(_sums_over_ranks, tmp_path) == [([[2**61 + 1, 2], [0, 1]], expected)] * 2
