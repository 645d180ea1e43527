"""What holds for every task: it learns, a perfect model scores perfectly, and sums add up."""

import pytest
import torch

from scalecv.config import LOSS_TERMS, Loss
from scalecv.errors import ConfigError
from scalecv.metrics.confusion import confusion
from scalecv.metrics.sums import add
from scalecv.models import build_model
from scalecv.models.losses import weighted
from scalecv.schema import IGNORE
from scalecv.tasks import TASKS

CASES = [("classify", 2), ("classify", 4), ("segment", 2), ("segment", 3)]
NAMES = ["back ground", "pv/roof", "c", "d"]
SIDE = 32


def batch_of(task, classes, rows=8, seed=0):
    """Images whose brightness (of the image, or of a square in it) tells the class."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, 3, SIDE, SIDE, generator=draw) * 0.3
    batch = {"valid": torch.ones(rows, dtype=torch.bool), "id": [f"{i:032x}" for i in range(rows)]}
    batch["position"] = torch.arange(rows)
    if task.name == "upscale":
        smooth = torch.nn.functional.interpolate(image[..., :12, :12], SIDE, mode="bicubic")
        return task.prepare({"image": smooth, **batch})
    if task.name == "classify":
        batch["label"] = torch.arange(rows) % classes
        image += batch["label"].view(-1, 1, 1, 1) - 1.0
    else:
        mask = torch.zeros(rows, SIDE, SIDE, dtype=torch.long)
        for row in range(rows):
            mask[row, 4 + row : 16 + row, 8:24] = 1 + row % (classes - 1)
        image += mask.unsqueeze(1) - 0.5
        mask[:, :2] = IGNORE
        batch["mask"] = mask
    return {"image": image, **batch}


def truth_as_logits(task, batch, classes):
    if task.name == "upscale":
        return batch["truth"]
    target = batch[task.target].clamp_min(0)
    hot = torch.nn.functional.one_hot(target, classes).float()
    hot = hot if task.name == "classify" else hot.permute(0, 3, 1, 2)
    return (hot * 20 - 10)[:, 1:] if task.outputs(classes) == 1 else hot * 20


def part(batch, where):
    return {k: [v[i] for i in range(len(v))[where]] if isinstance(v, list) else v[where] for k, v in batch.items()}


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_overfits_eight_images(name, classes):
    task = TASKS[name]
    batch = batch_of(task, classes)
    extra = {"stem": "small", "args": {"width": 8}} if name == "classify" else {}
    arch = "resnet10" if name == "classify" else "unet"
    model = build_model(arch, in_channels=3, outputs=task.outputs(classes), **extra)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    weights = task.default_loss(classes)
    for _ in range(60):
        value = weighted(task.losses(model(batch["image"]), batch, Loss(), None), weights).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scores = task.summarise(task.score(model(batch["image"]), batch), NAMES[:classes])
        if scores[task.headline] > 0.97:
            break
    assert scores[task.headline] > 0.97


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_the_truth_scores_perfectly(name, classes):
    task = TASKS[name]
    batch = batch_of(task, classes)
    logits = truth_as_logits(task, batch, classes)
    scores = task.summarise(task.score(logits, batch), NAMES[:classes])
    assert scores["accuracy"] == scores["macro_accuracy"] == scores["f1"] == scores[task.headline] == 1.0
    prediction, probability = task.predict(logits)
    labelled = batch[task.target] != IGNORE
    assert torch.equal(prediction[labelled], batch[task.target][labelled])
    assert probability.shape[1] == classes
    torch.testing.assert_close(probability.sum(1), torch.ones_like(probability[:, 0]))
    assert torch.equal(probability.argmax(1)[labelled], prediction[labelled])


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_halves_add_up_to_the_whole(name, classes):
    task = TASKS[name]
    batch = batch_of(task, classes)
    logits = truth_as_logits(task, batch, classes) + 15 * torch.randn(
        8, task.outputs(classes), *[1, 1][: 2 * (name == "segment")]
    )
    whole, halves = task.score(logits, batch), {}
    for where in (slice(0, 3), slice(3, 8)):
        add(halves, task.score(logits[where], part(batch, where)))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[k], halves[k]) for k in whole)
    assert whole["confusion"].dtype == whole["rows"].dtype == torch.int64
    every = Loss(**{t: 1.0 for t in LOSS_TERMS if not refused(task, t, classes)})
    terms = task.losses(logits, batch, every, None)
    for where in (slice(0, 3), slice(3, 8)):
        for term, value in task.losses(logits[where], part(batch, where), every, None).items():
            torch.testing.assert_close(value, terms[term][where])


def refused(task, term, classes):
    try:
        task.check(Loss(**{term: 1.0}), classes)
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_filler_rows_change_nothing(name, classes):
    task = TASKS[name]
    batch = batch_of(task, classes)
    logits = torch.randn(8, task.outputs(classes), *([SIDE, SIDE] if name == "segment" else []))
    real = part(batch, slice(0, 5))
    filled = {**batch, "valid": torch.arange(8) < 5}
    logits[5:] = float("nan")
    one, other = task.score(logits[:5], real), task.score(logits, filled)
    assert all(torch.equal(one[k], other[k]) for k in one) and int(other["rows"]) == 5
    terms = task.losses(logits, filled, Loss(), None)
    for term, value in task.losses(logits[:5], real, Loss(), None).items():
        assert torch.equal(terms[term][:5], value) and (terms[term][5:] == 0).all()
        assert value.shape == (5,) and value.dtype == torch.float32


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_numbers_have_names_that_mlflow_accepts(name, classes):
    from mlflow.utils.validation import _validate_metric_name

    task = TASKS[name]
    scores = task.summarise(
        task.score(truth_as_logits(task, b := batch_of(task, classes), classes), b), NAMES[:classes]
    )
    for key, value in scores.items():
        _validate_metric_name(f"val/{key}")
        assert isinstance(value, float)
    assert any(key.endswith("pv_roof") for key in scores)


def test_an_upscaler_overfits_eight_images_and_scores_the_truth_perfectly():
    task = TASKS["upscale"]
    batch = batch_of(task, 0)
    model = build_model("espcn", in_channels=3, outputs=task.outputs(0, 3), args={"width": 32})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = task.summarise(task.score(model(batch["image"]), batch), ())
    assert first["psnr"] == first["bicubic_psnr"] and first["ssim"] == first["bicubic_ssim"], "starts as bicubic"
    for _ in range(60):
        value = weighted(task.losses(model(batch["image"]), batch, Loss(), None), task.default_loss(0)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    scores = task.summarise(task.score(model(batch["image"]), batch), ())
    assert scores[task.headline] > first["psnr"] + 3 and scores["bicubic_psnr"] == first["psnr"]
    scores = task.summarise(task.score(batch[task.target], batch), ())
    assert scores["psnr"] == 100.0 and scores["ssim"] == pytest.approx(1.0)
    assert all(isinstance(value, float) for value in scores.values())


def test_halves_and_filler_rows_of_upscaling_add_up_to_the_whole():
    task = TASKS["upscale"]
    batch = batch_of(task, 0)
    images = batch["truth"] + 0.1 * torch.randn(8, 3, SIDE, SIDE)
    whole, halves = task.score(images, batch), {}
    for where in (slice(0, 3), slice(3, 8)):
        add(halves, task.score(images[where], part(batch, where)))
    assert whole.keys() == halves.keys() and whole["rows"].dtype == torch.int64
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name])
    spoilt, filled = images.clone(), {**batch, "valid": torch.arange(8) < 5}
    spoilt[5:] = float("nan")
    first = part(batch, slice(0, 5))
    for name, value in task.score(spoilt, filled).items():
        torch.testing.assert_close(value, task.score(images[:5], first)[name])
    every = Loss(l1=1.0, charbonnier=1.0, mse=1.0)
    for term, value in task.losses(images[:5], first, every, None).items():
        told = task.losses(spoilt, filled, every, None)[term]
        torch.testing.assert_close(told[:5], value)
        assert (told[5:] == 0).all() and value.shape == (5,) and value.dtype == torch.float32


def test_what_a_tile_has_no_data_for_is_neither_learnt_nor_scored():
    """Nodata is flat, and so easy: a tile of it alone would score 100 dB."""
    task, tile = TASKS["upscale"], torch.randn(2, 3, SIDE, SIDE)
    mask = torch.zeros(2, SIDE, SIDE, dtype=torch.int64)
    mask[0, :, : SIDE // 2], mask[1] = IGNORE, IGNORE
    tile.masked_fill_((mask == IGNORE)[:, None], 0.0)
    batch = task.prepare({"image": tile, "mask": mask, "valid": torch.ones(2, dtype=torch.bool)})
    images = (tile + torch.where((mask == IGNORE)[:, None], 5.0, 0.1)).requires_grad_()
    scores = task.summarise(task.score(images, batch), ())
    assert scores["psnr"] == pytest.approx(20.0, abs=1e-4), "0.1 of a range of 1, in the half that has data"
    losses = task.losses(images, batch, Loss(l1=1.0, charbonnier=1.0, mse=1.0), None)
    assert losses["l1"].tolist() == pytest.approx([0.1, 0.0]) and losses["mse"].tolist() == pytest.approx([0.01, 0.0])
    sum(losses.values()).sum().backward()
    assert (images.grad[0, :, :, SIDE // 2 :] != 0).all() and torch.isfinite(images.grad).all()
    assert (images.grad[0, :, :, : SIDE // 2] == 0).all() and (images.grad[1] == 0).all()


def test_more_than_twenty_classes_are_not_told_one_by_one():
    sums = {"confusion": torch.eye(43, dtype=torch.long)}
    assert set(TASKS["classify"].summarise(sums, [str(i) for i in range(43)])) == {"accuracy", "macro_accuracy", "f1"}


def test_classes_that_become_equal_keep_apart():
    sums = {"confusion": torch.eye(2, dtype=torch.long)}
    assert {"recall_a_b_0", "recall_a_b_1"} <= set(TASKS["classify"].summarise(sums, ["a/b", "a b"]))


def test_a_model_that_sees_nothing_is_told_as_trivial():
    batch = {"mask": torch.zeros(1, 10, 10, dtype=torch.long), "valid": torch.tensor([True])}
    batch["mask"][0, 0, :3] = 1
    scores = TASKS["segment"].summarise(TASKS["segment"].score(torch.full((1, 1, 10, 10), -9.0), batch), ["bg", "pv"])
    assert scores["accuracy"] == scores["trivial_accuracy"] == pytest.approx(0.97)
    assert scores["iou"] == scores["trivial_iou"] == scores["iou_pv"] == 0.0
    assert scores["is_trivial"] == 1.0


@pytest.mark.parametrize(
    ("name", "classes", "term", "fits"),
    [
        ("classify", 2, "bce", True),
        ("classify", 3, "bce", False),
        ("classify", 3, "dice", False),
        ("classify", 3, "jaccard", False),
        ("classify", 3, "focal", True),
        ("segment", 2, "bce", True),
        ("segment", 3, "bce", False),
        ("segment", 3, "dice", True),
        ("segment", 3, "l1", False),
        ("classify", 2, "mse", False),
        ("upscale", 0, "bce", False),
        ("upscale", 0, "charbonnier", True),
    ],
)
def test_terms_that_do_not_fit_are_refused(name, classes, term, fits):
    loss = Loss(**{term: 0.5})
    if fits:
        TASKS[name].check(loss, classes)
    else:
        with pytest.raises(ConfigError, match=f"loss.{term}=0.5"):
            TASKS[name].check(loss, classes)


def test_the_loss_of_the_experiment_goes_before_the_default():
    task, batch = TASKS["segment"], batch_of(TASKS["segment"], 2)
    logits = torch.randn(8, 1, SIDE, SIDE)
    assert set(task.losses(logits, batch, Loss(), None)) == {"bce", "dice"} == set(task.default_loss(2))
    assert set(task.losses(logits, batch, Loss(jaccard=1.0), None)) == {"jaccard"}
    assert set(task.default_loss(5)) == {"cross_entropy", "dice"}


@pytest.mark.parametrize("name", ["classify", "segment"])
@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.625])
def test_scores_at_a_threshold_are_those_of_the_predictions_at_it(name, threshold):
    task = TASKS[name]
    batch = batch_of(task, 2)
    logits = torch.randn(8, task.outputs(2), *([SIDE, SIDE] if name == "segment" else []))
    sums = task.score(logits, batch)
    prediction, probability = task.predict(logits, threshold)
    assert torch.equal(prediction, (probability[:, 1] >= threshold).long())
    matrix = confusion(prediction, batch[task.target], 2)
    told = task.summarise(sums, NAMES[:2], threshold)
    assert told == {**told, **task.summarise({"confusion": matrix}, NAMES[:2])}
    halves = {}
    for where in (slice(0, 3), slice(3, 8)):  # two ranks add up as two batches do
        add(halves, task.score(logits[where], part(batch, where)))
    assert task.summarise(halves, NAMES[:2], threshold) == told


def test_false_alarms_by_hand():
    masks = torch.zeros(3, 2, 2, dtype=torch.long)
    masks[0, 0, 0] = 1
    logits = torch.tensor([[[2.0, 1.0], [-1, -1]], [[-2, -2], [-0.1, -2]], [[-3, -3], [-3, -3]]]).unsqueeze(1)
    batch = {"mask": masks, "valid": torch.ones(3, dtype=torch.bool)}
    sums = TASKS["segment"].score(logits, batch)
    at_half, lower = (TASKS["segment"].summarise(sums, ["bg", "pv"], t) for t in (0.5, 0.25))
    assert (at_half["false_positives_per_tile"], at_half["false_alarm_tiles"]) == (pytest.approx(1 / 3), 0.0)
    assert (lower["false_positives_per_tile"], lower["false_alarm_tiles"]) == (pytest.approx(4 / 3), 0.5)
    assert at_half["is_trivial"] == 0.0 and next(iter(at_half)) == "iou"
