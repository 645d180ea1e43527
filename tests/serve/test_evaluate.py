"""Which datasets a bundle can score: what does not fit is refused before an image is read."""

import dataclasses

import numpy as np
import pytest

from scalecv import raster
from scalecv.artifacts import bundle
from scalecv.errors import DataError
from scalecv.serve.evaluate import check, evaluate
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from tests.serve import test_predict
from tests.shards.images import write

made = test_predict.made


@pytest.fixture
def ground(tmp_path):
    """A function that ingests four images of 20 px, with masks of 0, 1 and, in two rows, 255."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            image, mask = rng.integers(0, 255, (20, 20, 3), np.uint8), rng.integers(0, 2, (20, 20, 1), np.uint8)
            mask[:2] = 255
            write(tmp_path / "s", f"{split}/images/{name}.tif", raster.encode(image))
            write(tmp_path / "s", f"{split}/masks/{name}.tif", raster.encode(mask))
    options = {"source": str(tmp_path / "s"), "to": str(tmp_path / "ds"), "layout": "masks", "concurrency": 0}

    def make(**more) -> str:
        return ingest(IngestOptions(**options, mask_ignore=255, **more)).dataset

    return make


def test_sides_that_the_stride_does_not_divide_are_refused(made, ground):
    data = ground(mask_values=(0, 1), classes=("ground", "roof"))
    manifest = open_dataset(data).manifest
    opened = bundle.open_bundle(made("segment", 3, "uint8"), allow_import=True)
    check(opened, manifest, data, "val")
    call = opened.facts.call.model_copy(update={"arch": "fpn", "encoder": "resnet18", "args": {}})
    strided = dataclasses.replace(opened, facts=opened.facts.model_copy(update={"call": call}))
    with pytest.raises(DataError, match=r"20x20 pixels, and fpn with resnet18 needs multiples of 32; .*--tile 32"):
        check(strided, manifest, data, "val")


def test_what_the_masks_of_a_dataset_ignore_counts_nowhere(made, ground):
    model = made("segment", 3, "uint8")
    assert bundle.read_facts(model).pixels.mask_ignore is None
    scored = evaluate(model, ground(mask_values=(0, 1), classes=("ground", "roof")), split="val", allow_import=True)
    assert scored.rows == 2 and 0 < scored.metrics["val/accuracy"] < 1


def test_names_that_stand_for_other_values_are_refused(made, ground):
    data = ground(mask_values=(0, 1), classes=("roof", "ground"))
    opened = bundle.open_bundle(made("segment", 3, "uint8"), allow_import=True)
    with pytest.raises(DataError, match=r"names the mask value 0 roof, .* as ground: .* 0,1 --classes ground,roof"):
        check(opened, open_dataset(data).manifest, data, "val")
