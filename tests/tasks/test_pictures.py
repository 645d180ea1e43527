"""Pictures open, have the right content where it can be told, and are quick."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from scalecv.schema import IGNORE
from scalecv.tasks import pictures
from scalecv.tasks.pictures import Sample


def opened(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and min(image.size) > 100 and max(image.size) < 4000
    return np.asarray(image.convert("RGB"))


def matrix(k, rows=3000):
    draw = np.random.default_rng(0)
    truth = draw.integers(0, k, rows)
    said = np.where(draw.random(rows) < 0.9, truth, draw.integers(0, k, rows))
    out = np.zeros((k, k), np.int64)
    np.add.at(out, (truth, said), 1)
    return out


def names(k):
    return [f"class number {i} of $many_{{$" for i in range(k)]


@pytest.mark.parametrize("k", [1, 2, 10, 43, 400])
def test_charts_of_any_number_of_classes(k):
    opened(pictures.confusion_png(matrix(k), names(k)))
    opened(pictures.per_class_png(matrix(k), names(k)))


def test_confusion_of_nothing():
    opened(pictures.confusion_png(np.zeros((3, 3), np.int64), ["a", "b", "图像"]))


def test_table_of_classes():
    rows = list(csv.DictReader(io.StringIO(pictures.per_class_csv([[8, 2], [1, 9]], ["a", 'b,"c"']).decode())))
    assert rows[1]["class"] == 'b,"c"' and rows[0]["support"] == "10"
    assert float(rows[0]["recall"]) == 0.8 and float(rows[0]["precision"]) == pytest.approx(8 / 9, abs=1e-6)
    assert rows[0]["most_taken_for"] == 'b,"c"' and rows[0]["times"] == "2"


def test_curves_with_gaps_and_without_points():
    history = [
        {"epoch": float(i + 1), "train/loss": 1 / (i + 1), "val/loss": float("nan") if i == 2 else 1.0}
        for i in range(5)
    ]
    history[3]["val/iou"] = 0.5
    opened(pictures.curves_png(history))
    opened(pictures.curves_png([]))


def test_rgb_of_photographs_and_rasters():
    photo = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    assert np.array_equal(pictures.to_rgb(photo), photo.transpose(1, 2, 0))
    grey = pictures.to_rgb(photo[:1])
    assert grey.shape == (4, 5, 3) and np.array_equal(grey[..., 0], grey[..., 2])
    bands = np.random.default_rng(0).integers(200, 3000, (13, 64, 64)).astype(np.uint16)
    shown = pictures.to_rgb(bands)
    assert shown.dtype == np.uint8 and shown.min() == 0 and shown.max() == 255
    floats = np.ones((4, 8, 8), np.float32)
    floats[:, 0, 0] = np.nan
    shown = pictures.to_rgb(floats)
    assert (shown[0, 0] == 0).all() and (shown[1:] == 128).all()
    assert (pictures.to_rgb(np.full((1, 8, 8), np.inf, np.float32)) == 0).all()


def sample(truth, said, k, side=(40, 40), place=0):
    probability = np.full((k, *np.shape(said)), 0.1, np.float32)
    return Sample(np.full((*side, 3), 90, np.uint8), np.array(truth), np.array(said), probability, f"{place:032x}")


@pytest.mark.parametrize("count", [1, 3, 16])
def test_classified_images(count):
    samples = [sample(i % 3, 1, 3, side=(30 + i, 50), place=i) for i in range(count)]
    opened(pictures.predictions_png(samples, ["a", "b", "$c_$"], "classify", "val: $5_$"))


def test_a_wrong_answer_is_red():
    def red(said):
        image = opened(pictures.predictions_png([sample(0, said, 2)], ["a", "b"], "classify", "t")).astype(int)
        return int(((image[..., 0] > 150) & (image[..., 1] < 100)).sum())

    assert red(1) > 0 == red(0)


@pytest.mark.parametrize("k", [2, 5])
def test_segmented_images(k):
    truth = np.zeros((40, 60), np.int64)
    truth[10:30, 10:30] = k - 1
    truth[:3] = IGNORE
    samples = [sample(truth, np.roll(truth, i, 1).clip(0), k, side=(40, 60), place=i) for i in range(5)]
    image = opened(pictures.predictions_png(samples, [f"c{i}" for i in range(k)], "segment", "val: worst"))
    reddish = (image[..., 0].astype(int) - image[..., 1] > 80).sum()
    assert reddish > 50


def test_nothing_to_show_is_still_a_picture():
    for task in ("classify", "segment"):
        assert pictures.predictions_png([], ["a", "b"], task, "val").startswith(b"\x89PNG")


def test_colours_of_classes_differ():
    assert len({tuple(colour) for colour in pictures.palette(43)}) == 43


def test_curves_of_a_threshold_also_of_nothing():
    import torch

    from scalecv.metrics import binned
    from scalecv.tasks.curves import curves_of_two

    truth = (torch.rand(5000) < 0.1).long()
    p = torch.sigmoid(torch.randn(5000) + 3 * truth - 2)
    counts = binned.counts(p.view(1, -1), truth.view(1, -1), torch.tensor([True]))
    for found in (counts, torch.zeros_like(counts), counts * torch.tensor([[1], [0]])):
        drawn = curves_of_two(found, 0.25, "val: $5_$")
        assert set(drawn) == {"precision_recall", "thresholds", "calibration"}
        for data in drawn.values():
            opened(data)


def test_a_sample_at_a_threshold():
    probability = np.array([[0.2, 0.5], [0.7, 0.9]], np.float32)
    one = Sample(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.int64), np.ones((2, 2), np.int64), probability, "0")
    assert one.at(0.75).prediction.tolist() == [[0, 0], [0, 1]] and one.at(0.5).prediction.sum() == 3
    row = Sample(np.zeros((2, 2, 3), np.uint8), np.array(1), np.array(1), np.array([0.6, 0.4], np.float32), "0")
    assert (int(row.at(0.25).prediction), int(row.at(0.5).prediction)) == (1, 0)
