"""The threshold of two classes: tuned on validation, kept in the bundle, used with it; and the pictures of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scalecv import storage
from scalecv.artifacts import bundle, spool
from scalecv.batches.feed import Feed
from scalecv.errors import ConfigError
from scalecv.schema import IGNORE
from scalecv.serve.evaluate import evaluate
from scalecv.shards.store import open_dataset
from scalecv.train.run import train

NET = """
from torch import nn
def build(in_channels, outputs):
    net = nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1))
    nn.init.constant_(net[2].bias, -2.0)
    return net
"""


@pytest.fixture
def roofs(fields, tmp_path, monkeypatch):
    """A small network on fields, in a module that both training and bundles import."""
    (tmp_path / "roofnet.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    keys = {"model__arch": "roofnet:build", "train__lr": 3e-3, "train__epochs": 3, "loss__name": "bce_focal_neg_iou"}
    return lambda **more: fields(**{**keys, **more})


def by_hand(uri, dataset, split):
    """(IoU, false positives per tile) of a bundle's network at the bundle's threshold, pixel by pixel."""
    opened = bundle.open_bundle(uri, allow_import=True)
    feed = Feed(open_dataset(dataset), split, opened.pixels(), 8, threads=1)
    inside = union = false = rows = 0
    mean, std = (torch.tensor(v)[:, None, None] for v in (opened.facts.pixels.mean, opened.facts.pixels.std))
    for _, raw in feed.epoch(0):
        with torch.no_grad():
            p = torch.sigmoid(opened.model((raw["image"].float() - mean) / std))[:, 0].numpy()
        truth = raw["mask"].numpy()
        for row in np.flatnonzero(raw["valid"].numpy()):
            labelled = truth[row] != IGNORE
            said, true = (p[row] >= opened.facts.threshold) & labelled, truth[row] == 1
            inside, union, rows = inside + (said & true).sum(), union + (said | true).sum(), rows + 1
            false += (said & ~true).sum()
    return inside / union, false / rows


def test_the_stored_threshold_gives_the_reported_scores_on_another_split(roofs, fields_dataset):
    told = []
    result = train(roofs(), tell=told.append)
    facts = bundle.read_facts(result.bundle)
    assert facts.threshold == result.metrics["val/threshold"] != 0.5
    assert any(f"threshold {facts.threshold:.4g}" in event.get("message", "") for event in told)
    half = [event["metrics"] for event in told if event.get("is_epoch_end")]
    assert result.metrics["val/iou"] > max(metrics["val/iou"] for metrics in half)
    for split in ("val", "train"):
        scored = evaluate(result.bundle, fields_dataset, split=split, allow_import=True)
        iou, false = by_hand(result.bundle, fields_dataset, split)
        assert scored.threshold == facts.threshold
        assert scored.metrics[f"{split}/iou"] == pytest.approx(iou, abs=2e-3)
        assert scored.metrics[f"{split}/false_positives_per_tile"] == pytest.approx(false, rel=0.02, abs=0.2)
    again = evaluate(result.bundle, fields_dataset, split="val", allow_import=True)
    assert {k: again.metrics[k] for k in ("val/iou", "val/f1")} == {k: result.metrics[k] for k in ("val/iou", "val/f1")}
    _pictures(result, told)
    _old_bundle(result.bundle)


def _pictures(result, told):
    """Six of each validation, and of the best weights, by key and step; none larger than half a megabyte."""
    from mlflow import MlflowClient

    events = [e for e in spool.read(next(Path(result.run_uri).rglob("spool.jsonl")))[0] if e["kind"] == "image"]
    kinds = {"predictions", "worst", "best", "precision_recall", "thresholds", "calibration"}
    steps = {event["step"] for event in events if event["key"].startswith("val/")}
    assert len(steps) == 3
    for step in steps:
        assert {e["key"] for e in events if e["step"] == step and e["key"].startswith("val/")} == {
            f"val/{kind}" for kind in kinds
        }
    assert {f"best/val/{kind}" for kind in (*kinds, "confusion")} == {
        e["key"] for e in events if e["key"].startswith("best/")
    }
    assert all(len(storage.get(event["uri"])) < 500_000 for event in events)
    client = MlflowClient(result.tracking_uri)
    shown = [file.path for file in client.list_artifacts(result.run_id, "images")]
    for step in steps:
        assert any(path.startswith(f"images/val~thresholds+step+{step}+") for path in shown)


def _old_bundle(uri):
    """A bundle from before there was a threshold is read with 0.5."""
    tree = json.loads(Path(uri, bundle.FACTS).read_text())
    del tree["threshold"]
    Path(uri, bundle.FACTS).write_text(json.dumps(tree))
    assert bundle.read_facts(uri).threshold == 0.5


def test_a_threshold_that_is_set_is_used_from_the_first_validation(roofs):
    result = train(roofs(train__threshold=0.3, train__epochs=1, track__pictures=0))
    assert bundle.read_facts(result.bundle).threshold == result.metrics["val/threshold"] == 1229 / 4096


def test_a_threshold_of_more_classes_is_refused(shapes):
    with pytest.raises(ConfigError, match=r"train.threshold=0.3 is for two classes, .* has 3"):
        train(shapes(train__threshold=0.3))
