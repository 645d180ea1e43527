import io

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from scalecv.shards.show import facts_json, facts_table, sample_grid
from scalecv.shards.store import open_dataset
from tests.shards.images import class_folders
from tests.shards.test_ingest import run


def shown(dataset) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(facts_table(dataset))
    return out.getvalue()


def test_facts_for_people_and_programs_agree(tmp_path):
    class_folders(tmp_path / "s")
    (tmp_path / "s" / "class0").rename(tmp_path / "s" / "[red]stop")
    run(tmp_path / "s", tmp_path / "ds")
    dataset = open_dataset(str(tmp_path / "ds"))
    text, facts = shown(dataset), facts_json(dataset)
    assert "[red]stop" in text and dataset.manifest.fingerprint in text and "uint8x3: 36" in text
    assert (facts["rows"], facts["version"], facts["quarantined"]) == (36, 0, 0)
    assert facts["shards"]["count"] == len(dataset.manifest.shards)
    assert sum(sum(c.values()) for c in facts["class_counts"].values()) == 36


def test_a_picture_shows_the_classes_in_turn(tmp_path):
    class_folders(tmp_path / "s", classes=4)
    run(tmp_path / "s", tmp_path / "ds", row_group_mb=0.01)
    picture = str(tmp_path / "grid.png")
    assert sample_grid(open_dataset(str(tmp_path / "ds")), picture, count=8) == picture
    assert PIL.Image.open(picture).width == 8 * 132


@pytest.mark.parametrize("name", ["pv4band", "water12"])
def test_rasters_are_stretched_and_masks_lie_over_them(shared_data, tmp_path, name):
    run(shared_data(name), tmp_path / "ds", "masks")
    dataset = open_dataset(str(tmp_path / "ds"))
    sample_grid(dataset, str(tmp_path / "grid.png"), count=6)
    pixels = np.asarray(PIL.Image.open(tmp_path / "grid.png")).astype(int)
    reddish = (pixels[..., 0] > pixels[..., 2] + 60).mean()
    assert reddish > 0.01 and pixels.std() > 20
    assert "train, pixels" in shown(dataset)
