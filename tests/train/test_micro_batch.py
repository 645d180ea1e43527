"""Micro-batches that are found where memory runs out. The networks below run out of it by asking for too much."""

import json
import math
from pathlib import Path

import pytest
import torch

from scalecv.artifacts import bundle, spool
from scalecv.errors import Interrupted
from scalecv.train import runs
from scalecv.train.memory import free_bytes, growth
from scalecv.train.micro_batch import FILE, OutOfMemory, _within, is_out_of_memory, parts, sizes
from scalecv.train.run import train
from tests.train import ranks

SGD = {"train__optimizer": "sgd", "train__epochs": 2, "track__log_every": 1}
TOO_MUCH = "if self.training and len(x) > {most}: torch.empty(1 << 55)"
"""What torch's allocator for CPUs refuses."""


def folder(experiment):
    return Path(runs.home(experiment)) / "001"


def told_of(experiment):
    return spool.read(folder(experiment) / "spool.jsonl", most_bytes=1 << 30)[0]


def messages(experiment):
    return [event["message"] for event in told_of(experiment) if "memory" in event.get("message", "")] + [
        event["message"] for event in told_of(experiment) if "train.micro_batch=auto" in event.get("message", "")
    ]


def weights(result):
    return bundle.read_weights(result.bundle, bundle.read_facts(result.bundle))


def apart(one, other):
    a, b = weights(one), weights(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a if name != "seen")


@pytest.mark.parametrize(
    ("rows", "smallest", "found"), [(16, 1, [16, 8, 4, 2, 1]), (5, 1, [5, 3, 2, 1]), (5, 2, [5, 3]), (1, 2, [1])]
)
def test_halves(rows, smallest, found):
    assert sizes(rows, smallest) == found
    for size in found:
        cut = parts(slice(3, 3 + rows), size)
        lengths = [part.stop - part.start for part in cut]
        assert sum(lengths) == rows and max(lengths) <= size and max(lengths) - min(lengths) <= 1
        assert min(lengths) >= min(smallest, rows)
        assert [part.start for part in cut[1:]] == [part.stop for part in cut[:-1]]


def test_the_size_is_found_and_the_update_is_that_of_the_whole_batch(shapes, net):
    """Each batch of 16 in parts of 4; a run that is stopped goes on with the same size, and ends with the same bits."""
    whole = train(shapes(name="whole", **SGD, **net("enough", "pass")))
    keys = {**SGD, **net("little", TOO_MUCH.format(most=4)), "train__micro_batch": "auto"}
    cut = train(shapes(name="cut", **keys))
    assert cut.order_hash == whole.order_hash and apart(cut, whole) < 1e-5
    (said,) = messages(shapes(name="cut", **keys))
    assert said.startswith("train.micro_batch=auto: 4 of a worker's 16 images at a time") and "norm" not in said
    metrics = [event["metrics"] for event in told_of(shapes(name="cut", **keys)) if event["kind"] == "metrics"]
    assert [one["system/micro_batch"] for one in metrics if "system/micro_batch" in one] == [4.0]
    points = [one for one in metrics if "time/compute_s" in one]
    parts_of_a_step = [f"time/{part}_s" for part in ("decode", "transfer", "compute", "sync", "optimizer")]
    assert len(points) == 10 and all(one[name] >= 0 for one in points for name in parts_of_a_step)
    assert all(one["time/compute_s"] > one["time/sync_s"] and one["time/decode_s"] < 60 for one in points)

    experiment = shapes(name="stopped", **keys)

    def stop(event):
        if event.get("is_epoch_end") and event["epoch"] == 1:
            (folder(experiment) / "STOP").write_bytes(b"stop")

    with pytest.raises(Interrupted):
        train(experiment, tell=stop)
    assert train(experiment).weights_hash == cut.weights_hash
    assert len(messages(experiment)) == 1, "not looked for again"


def test_memory_that_runs_out_within_a_step_repeats_it(shapes, net):
    """In the second step, after half of its gradient: nothing of the first try stays in gradients or buffers."""
    act = """
self.seen += self.training
if self.training and self.calls == 9 and len(x) > 4: raise torch.OutOfMemoryError("CUDA out of memory.")
if self.training and len(x) > 8: raise torch.OutOfMemoryError("CUDA out of memory.")
"""
    keys = {**SGD, "train__epochs": 1}
    quiet = train(shapes(name="quiet", **keys, train__micro_batch=8, **net("calm", "self.seen += self.training")))
    experiment = shapes(name="later", **keys, train__micro_batch="auto", **net("later", act))
    result = train(experiment)
    steps = int(weights(quiet)["seen"]) // 2
    said = [text for text in messages(experiment) if "this step is repeated with 4" in text]
    assert len(said) == 1 and apart(result, quiet) < 1e-5
    # Calls 1 to 5 are the search (one image twice, 16 fail, 8 twice), 6 and 7 the first step, 9 the half of the second.
    assert int(weights(result)["seen"]) == 2 + 4 * (steps - 1)
    assert json.loads((folder(experiment) / FILE).read_text()) == {"rows": 16, "size": 4}


def test_recomputing_changes_no_bit(shapes):
    """With running statistics, channels_last and the fused optimiser."""
    keys = {"train__epochs": 1, "train__channels_last": True, "train__clip_norm": 1.0}
    plain = train(shapes(name="plain", **keys))
    again = train(shapes(name="again", train__recompute=True, **keys))
    assert again.weights_hash == plain.weights_hash and again.metrics["val/loss"] == plain.metrics["val/loss"]


@pytest.mark.chaos
def test_compiled_it_learns_the_same(shapes):
    """Within rounding: a compiled network adds in another order."""
    keys = {**SGD, "train__epochs": 1, "model__norm": "group"}
    plain = train(shapes(name="plain", **keys))
    for name, more in {"fast": {}, "less": {"train__recompute": True, "train__micro_batch": "auto"}}.items():
        assert apart(train(shapes(name=name, train__compile=True, **more, **keys)), plain) < 1e-4


def test_one_image_that_does_not_fit_is_told_with_what_to_do(shapes, net):
    keys = {**SGD, **net("nothing", TOO_MUCH.format(most=0))}
    with pytest.raises(OutOfMemory, match=r"as few as 1 images .*can't allocate memory.* set train.recompute=true"):
        train(shapes(name="auto", **keys, train__micro_batch="auto"))
    with pytest.raises(OutOfMemory, match=r"of 16 images .* set train.micro_batch=auto, train.recompute=true"):
        train(shapes(name="set", **keys))


@pytest.mark.chaos
def test_all_ranks_take_the_smallest_and_start_again_where_memory_runs_out_later(shapes, net, tmp_path):
    """Rank 1 has room for 4 of 8 images, and in its third step only for 2."""
    act = """
if self.training and rank == 1 and (len(x) > 4 or (len(x) > 2 and self.calls == 8)):
    raise torch.OutOfMemoryError("CUDA out of memory.")
"""
    keys = {**SGD, **net("uneven", act), "train__micro_batch": "auto", "scale__workers": 2}
    experiment = shapes(name="uneven", **keys)
    statuses, said = ranks.ended(ranks.start(experiment, 2, tmp_path))
    assert statuses[1] == ranks.LEFT and statuses[0] != 0, said
    assert json.loads((folder(experiment) / FILE).read_text()) == {"rows": 8, "size": 2}
    statuses, said = ranks.ended(ranks.start(experiment, 2, tmp_path))
    assert statuses == [0, 0], said
    assert messages(experiment)[-1].startswith("train.micro_batch=auto: 4 of a worker's 8 images at a time")
    times = [event["metrics"] for event in told_of(experiment) if "time/sync_s" in event.get("metrics", {})]
    assert all(0 < one["time/sync_s"] < 60 for one in times)


def test_what_the_kernel_says_of_memory(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    (proc / "self/cgroup").write_text("1:cpu:/\n4:memory:/jobs/one\n0::/slice/two\n")
    assert free_bytes(proc, groups) == 1000 * 1024
    two = groups / "slice/two"
    two.mkdir(parents=True)
    for name, text in {"max": "max", "current": "0", "stat": "inactive_file 10"}.items():
        (two / f"memory.{name}").write_text(text)
    for name, text in {"max": "900000", "current": "200000", "stat": "anon 1\ninactive_file 50000"}.items():
        (two.parent / f"memory.{name}").write_text(text)
    assert free_bytes(proc, groups) == 750000, "a group above it has the limit"
    one = groups / "memory/jobs/one"
    one.mkdir(parents=True)
    for name, text in {"limit_in_bytes": "500", "usage_in_bytes": "400", "stat": "total_inactive_file 9"}.items():
        (one / f"memory.{name}").write_text(text)
    assert free_bytes(proc, groups) == 109
    assert free_bytes(tmp_path / "nowhere", groups) == math.inf


def test_growth_is_what_was_taken_at_the_largest():
    def work():
        torch.ones(40_000_000)
        torch.ones(10_000_000)

    grown = growth(work)
    assert grown is None or 0.9 < grown / 160e6 < 1.3


def test_what_says_that_memory_is_out():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 55)
    assert (
        is_out_of_memory(refused.value)
        and is_out_of_memory(torch.OutOfMemoryError("x"))
        and not is_out_of_memory(RuntimeError("shape"))
    )


def test_a_cpu_takes_what_its_memory_holds():
    """40 MB for each image: eight of sixteen where 500 MB are free, one image where nothing is."""

    def fits(size):
        torch.ones(size * 10_000_000)
        return True

    left, said = _within([16, 8, 4, 2, 1], fits, 500e6)
    assert (left == [8, 4, 2, 1] and "GB are free" in said) or "nothing is known" in said
    left, _ = _within([16, 8, 4, 2, 1], fits, 0.0)
    assert left == [1] or "nothing is known" in said
    left, _ = _within([16, 8, 4, 2, 1], lambda size: size < 4, 1e15)
    assert left[0] in (16, 2)
