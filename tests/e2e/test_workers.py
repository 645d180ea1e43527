"""One experiment on 0, 1 and 2 workers, from disk and from S3, with a worker lost on the way: the same result."""

import sys

import pytest
import torch

from scalecv.artifacts import bundle
from scalecv.errors import ConfigError, ScalecvError
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.train.run import train
from tests import make
from tests.small import write_net

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_local")]
PLAIN = {"model__norm": "group", "train__optimizer": "sgd", "train__lr": 0.01, "train__epochs": 2}


def weights(result):
    return bundle.read_weights(result.bundle, bundle.read_facts(result.bundle))


def largest_difference(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_0_1_and_2_workers_see_the_same_and_learn_the_same(shapes):
    readers = {0: "threads", 1: "auto", 2: "ray"}
    results = {n: train(shapes(name=f"w{n}", scale__workers=n, data__reader=readers[n], **PLAIN)) for n in readers}
    assert len({r.order_hash for r in results.values()}) == 1, "the same ids in every global batch"
    assert len({r.metrics["val/rows"] for r in results.values()}) == 1
    assert len({r.metrics["test/rows"] for r in results.values()}) == 1
    for n in (1, 2):
        assert largest_difference(weights(results[0]), weights(results[n])) < 1e-5, n
    assert weights(results[0]).keys() == weights(results[2]).keys(), "no prefix of DDP stays in a bundle"


@pytest.mark.chaos
def test_from_s3_as_from_disk(shapes, s3, tmp_path):
    make.shapes(tmp_path / "images")
    bucket = s3.bucket()
    local = IngestOptions(
        source=str(tmp_path / "images"), to=str(tmp_path / "data"), layout="imagefolder", concurrency=0
    )
    here = ingest(local)
    there = ingest(local.model_copy(update={"to": f"{bucket}/data"}))
    assert here.fingerprint == there.fingerprint
    disk = train(shapes(name="disk", data__uri=str(tmp_path / "data"), scale__workers=0))
    keys = {"data__uri": f"{bucket}/data", "track__storage": f"{bucket}/runs"}
    cloud = train(shapes(name="cloud", scale__workers=2, data__reader="ray", model__norm="batch", **keys))
    alone = train(shapes(name="alone", scale__workers=0, **keys))
    assert disk.order_hash == cloud.order_hash == alone.order_hash
    assert alone.metrics == disk.metrics and alone.weights_hash == disk.weights_hash
    assert cloud.bundle.startswith(bucket) and bundle.open_bundle(cloud.bundle).facts.epoch >= 1
    assert train(shapes(name="alone", scale__workers=0, **keys)).was_complete


@pytest.mark.chaos
def test_a_killed_worker_is_started_again_and_the_weights_are_those_of_one_process(shapes, tmp_path):
    """Rank 1 kills itself in the middle of epoch 2, once; Ray starts both again from the checkpoint.

    With `train.exact` the end is, bit for bit, that of an undisturbed run in one process (AdamW, where DDP differs).
    """
    act = """
if self.calls == 18 and rank == 1 and not os.path.exists(marker):
    open(marker, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
"""
    marker, told = tmp_path / "marker", []
    keys = {"train__exact": True, **write_net(tmp_path, "killer", act), "model__args": {"marker": str(marker)}}
    lost = train(shapes(name="lost", scale__workers=2, **keys), code_dirs=(str(tmp_path),), tell=told.append)
    assert marker.exists()
    assert any("goes on in epoch" in e.get("message", "") for e in told)
    sys.path.append(str(tmp_path))
    quiet = train(shapes(name="quiet", scale__workers=0, **keys))
    assert (lost.order_hash, lost.weights_hash) == (quiet.order_hash, quiet.weights_hash)


@pytest.mark.chaos
def test_a_bug_is_shown_after_the_first_start(shapes, tmp_path):
    keys = write_net(tmp_path, "buggy", "raise ZeroDivisionError(f'bug in {os.getpid()}')")
    with pytest.raises(ScalecvError, match="ZeroDivisionError: bug in") as said:
        train(shapes(scale__workers=1, **keys), code_dirs=(str(tmp_path),))
    assert said.value.exit_code == 1


def test_a_mistake_found_by_a_worker_is_the_users(shapes):
    with pytest.raises(ConfigError, match=r"resnet19.*resnet18") as said:
        train(shapes(scale__workers=1, model__arch="resnet19"))
    assert said.value.exit_code == 2


def test_more_workers_than_cpus_is_refused(shapes):
    with pytest.raises(ConfigError, match=r"scale.workers=8 needs 8 CPUs, the cluster has 2: set scale.workers=2"):
        train(shapes(scale__workers=8, train__batch=16))


def test_ray_data_and_threads_give_the_same_batches(shapes_dataset):
    from scalecv.batches.feed import Feed
    from scalecv.batches.pixels import pixels_of
    from scalecv.config import Data
    from scalecv.shards.store import open_dataset

    dataset = open_dataset(shapes_dataset)
    pixels = pixels_of(dataset.manifest, Data(uri=shapes_dataset), shapes_dataset)
    found = {}
    for reader in ("threads", "ray"):
        feed = Feed(dataset, "train", pixels, 16, is_training=True, reader=reader)
        found[reader] = [(b["id"], b["image"].clone(), b["label"]) for _, b in feed.epoch(3, start=1)]
    assert len(found["ray"]) == len(found["threads"]) > 2
    for (ids, image, label), (other_ids, other_image, other_label) in zip(found["ray"], found["threads"], strict=True):
        assert ids == other_ids and torch.equal(image, other_image) and torch.equal(label, other_label)
