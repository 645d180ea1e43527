"""Sums over batches and over processes."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scalecv.metrics.sums import add, over_ranks


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


def _rank(rank, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    big = 2**60 + rank  # would not survive float64
    sums = {"confusion": torch.tensor([[big, 1], [0, rank]]), "loss": torch.tensor(0.1 * (rank + 1))}
    # The names arrive in another order on each rank.
    out = over_ranks(sums if rank else dict(reversed(sums.items())))
    queue.put((out["confusion"].tolist(), float(out["loss"])))
    dist.destroy_process_group()


def test_two_processes_add_up_exactly(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(rank, tmp_path / "meet", queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = [queue.get(), queue.get()]
    for worker in workers:
        worker.join(60)
    expected = float(torch.tensor(0.1).double() + torch.tensor(0.2).double())
    assert got == [([[2**61 + 1, 2], [0, 1]], expected)] * 2
