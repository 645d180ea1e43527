"""Errors that trainings of this kind are known for, one test each; what one already guards elsewhere is not repeated.

Elsewhere:
- a sigmoid asked for by model.args, and networks that cannot take the size or the bands: tests/models/test_build.py,
  test_dry_run.py
- no gradient on empty tiles, infinite ones at large logits: tests/models/test_losses.py
- a fourth band that silently gets red's weights: tests/models/test_bands.py
- statistics of a batch of one: tests/models/test_norms.py
- a subset of a class-sorted source that holds two classes: tests/batches/test_sampling.py
- bands that are only cast, or nodata that counts: tests/batches/test_pixels.py, test_radiometry.py,
  tests/metrics/test_confusion.py
- neighbouring tiles in two splits: tests/train/test_leaks.py, tests/shards/test_ingest_scenes.py; frames of one object:
  tests/shards/test_plan.py
- scores at two and four times the side compared with native ones: tests/train/test_upscale.py
- decoding that waits for the step, and a step's wait that nobody counts: tests/batches/test_feed.py
- images that are compressed twice: tests/shards/test_store.py
- small images that lose their pixels in the stem, the first passes of a network in its time: tests/models/test_build.py
- ranks that each learn alone: tests/e2e/test_workers.py; rows that two of them see: tests/batches/test_plan.py
- memory that is guessed, not measured: tests/train/test_micro_batch.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from scalecv import config, storage
from scalecv.artifacts import spool
from scalecv.display import Display
from scalecv.errors import ConfigError, ScalecvError
from scalecv.models import build_model, losses
from scalecv.tasks import TASKS
from scalecv.train import checkpoint, runs
from scalecv.train.job import Job, Place
from scalecv.train.run import train
from scalecv.train.worker import work
from tests.small import write_net
from tests.train import ranks

PIXELS = """
from torch import nn
def build(in_channels, outputs):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, outputs, 1))
"""


SEEING = """
from torch import nn
class Seeing(nn.Sequential):
    def forward(self, x):
        with open("images", "a") as file:
            for image in x:
                print(self.training, float(image.double().sum()), file=file)
        return super().forward(x)
def build(in_channels, outputs):
    return Seeing(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, outputs, 1))
"""


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "torch.bfloat16"), ("fp32", "torch.float32")])
def test_autocast_that_does_not_cast(shapes, tmp_path, monkeypatch, precision, dtype):
    """Activations have the precision of the run, in training and in validation; and validation reaches no backward."""
    act = """
with open("seen", "a") as file:
    print(self.body[0](x).dtype, self.training, torch.is_grad_enabled(), file=file)
"""
    monkeypatch.syspath_prepend(tmp_path)
    train(shapes(**write_net(tmp_path, f"seeing_{precision}", act), train__epochs=1, train__precision=precision))
    seen = {tuple(line.split()) for line in Path("seen").read_text().splitlines()}
    assert {(dtype, "True", "True"), (dtype, "False", "False")} <= seen
    assert not any(training == "False" and gradient == "True" for _, training, gradient in seen)


def test_a_loss_scaler_made_anew_each_step(shapes, monkeypatch):
    """One scaler for the run, whose state is in every checkpoint."""
    made = []
    plain = torch.amp.GradScaler.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", counted)
    result = train(shapes(train__epochs=2))
    assert len(made) == 1
    kept = checkpoint.complete(result.run_uri)[0][-1]
    assert "scaler" in json.loads(storage.get(storage.join(kept.uri, checkpoint.STATE)))


def test_gradients_that_pile_up_and_validation_that_is_learnt(fields, tmp_path, monkeypatch):
    """The same rows at weights that stand still have the same gradient in each step; no row of val is among them."""
    (tmp_path / "seeing.py").write_text(SEEING)
    monkeypatch.syspath_prepend(tmp_path)
    still = {"train__lr": 1e-12, "train__batch": 18, "train__epochs": 3, "track__log_every": 1, "track__pictures": 0}
    experiment = fields(model__arch="seeing:build", name="still", **still)
    run, events = runs.open_run(experiment, lambda _: None), []
    work(Job(experiment, run.dataset.version, run.uri, "threads"), Place(), events.extend)
    points = [event["metrics"] for event in events if event["kind"] == "metrics"]
    norms = [point["train/grad_norm"] for point in points if "train/grad_norm" in point]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3) and norms[0] > 0
    seen = {tuple(line.split()) for line in Path("images").read_text().splitlines()}
    learnt, scored = ({image for training, image in seen if training == kind} for kind in ("True", "False"))
    assert len(learnt) == 18 and len(scored) >= 6 and not learnt & scored


@pytest.mark.parametrize("arch", ["unet", "fpn", "deeplabv3plus"])
def test_a_sigmoid_before_a_loss_on_logits(arch):
    """A network gives logits: they move as far as the head's bias does."""
    model = build_model(arch, in_channels=3, outputs=1, encoder="resnet18").eval()
    last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.bias.fill_(-40.0)
        assert float(model(torch.zeros(1, 3, 64, 64)).max()) < -20


def test_an_iou_loss_without_gradient_on_tiles_without_positives():
    from segmentation_models_pytorch.losses import JaccardLoss

    truth = torch.zeros(2, 16, 16, dtype=torch.long)
    for own, has_gradient in ((losses.jaccard, True), (losses.pos_neg_iou, True), (JaccardLoss("binary"), False)):
        logits = torch.full((2, 1, 16, 16), 2.0, requires_grad=True)
        own(logits, truth if has_gradient else truth.unsqueeze(1)).sum().backward()
        assert bool((logits.grad > 0).all()) == has_gradient


def test_a_weight_of_positives_that_cannot_be_searched():
    tree = {"name": "a", "task": "segment", "data": {"uri": "d"}, "model": {"arch": "unet"}}
    tree["loss"] = {"name": "bce_focal_neg_iou"}
    two, thirty = (
        config.build(config.with_overrides(tree, {"loss.pos_weight": weight}), "test") for weight in (2.0, 30.0)
    )
    assert config.build(tree, "test").loss == two.loss
    assert two.identity() != thirty.identity()
    batch = {"mask": torch.ones(1, 4, 4, dtype=torch.long), "valid": torch.tensor([True])}
    logits = torch.zeros(1, 1, 4, 4)
    first, second = (TASKS["segment"].losses(logits, batch, one.loss, None)["bce"] for one in (two, thirty))
    torch.testing.assert_close(second, 15 * first)


def test_an_objective_that_moves_with_the_weights_of_the_loss(fields, tmp_path, monkeypatch):
    """What decides is a metric: a thousandth of the loss has another loss, and the same score of the same weights."""
    (tmp_path / "pixels.py").write_text(PIXELS)
    monkeypatch.syspath_prepend(tmp_path)
    told = {"model__arch": "pixels:build", "train__epochs": 1, "train__lr": 1e-12, "track__pictures": 0}
    found = {}
    for weight in (1.0, 0.001):
        result = train(fields(**told, name=f"weight{weight}", loss__bce=weight, loss__dice=weight))
        kept = checkpoint.complete(result.run_uri)[0][-1]
        found[weight] = (kept.metric, result.metrics["val/loss"])
        history = json.loads(storage.get(storage.join(kept.uri, checkpoint.STATE)))["history"]
        assert kept.metric == history[-1]["val/iou"]
    assert found[1.0][0] == found[0.001][0]
    assert found[1.0][1] == pytest.approx(1000 * found[0.001][1], rel=1e-3)


def test_pixel_accuracy_as_the_first_number(capsys):
    """97 % background: a model that sees nothing has 97 % accuracy, and is told as trivial, by IoU and F1."""
    batch = {"mask": torch.zeros(1, 10, 10, dtype=torch.long), "valid": torch.tensor([True])}
    batch["mask"][0, 0, :3] = 1
    task = TASKS["segment"]
    scores = task.summarise(task.score(torch.full((1, 1, 10, 10), -9.0), batch), ["bg", "pv"])
    assert task.headline == next(iter(scores)) == "iou" and scores["is_trivial"] == 1.0
    assert list(scores).index("accuracy") > list(scores).index("macro_accuracy") > list(scores).index("f1")
    told = {f"val/{name}": value for name, value in scores.items()} | {"train/loss": 0.1}
    told |= {"system/epoch_images_per_s": 1.0, "system/epoch_data_wait_share": 0.0}
    Display()({"kind": "progress", "is_epoch_end": True, "epoch": 1, "epochs": 2, "metrics": told, "left_s": 0})
    said = capsys.readouterr().err
    assert "val/iou 0.0000" in said and "says background everywhere" in said and "val/accuracy" not in said


def test_a_test_split_that_decides(shapes, shapes_dataset, tmp_path):
    """Test rows are not looked at before the end: without their shard all epochs go through."""
    copy = tmp_path / "data"
    shutil.copytree(shapes_dataset, copy)
    with pytest.raises(ConfigError, match="expected a name such as val/accuracy"):
        train(shapes(data__uri=str(copy), train__metric="test/accuracy", name="deciding"))
    gone = list(copy.glob("split=test/*"))
    assert gone
    for file in gone:
        file.unlink()
    experiment = shapes(data__uri=str(copy), train__epochs=2)
    with pytest.raises(ScalecvError):
        train(experiment)
    folder = Path(runs.home(experiment)) / "001"
    events = spool.read(next(folder.rglob("spool.jsonl")))[0]
    names = [name for event in events if event["kind"] == "metrics" for name in event["metrics"]]
    assert names.count("val/accuracy") == 2 and not any(name.startswith("test/") for name in names)


def test_ranks_that_disagree_on_when_to_stop(fields, tmp_path):
    """Each rank sees other rows; the end of training, and the rate, come from the sums over all of them."""
    keys = {"train__early_stop_patience": 1, "train__early_stop_min_delta": 2.0, "train__schedule": "plateau"}
    experiment = fields(name="agreed", train__epochs=9, **keys)
    ends, said = ranks.ended(ranks.start(experiment, 2, tmp_path))
    assert ends == [0, 0], said
    events = spool.read(next(tmp_path.rglob("spool.jsonl")))[0]
    assert sum(bool(event.get("is_epoch_end")) for event in events) == 2
