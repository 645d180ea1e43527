"""What each row adds to the metrics: it adds up to the whole, over batches and ranks; a sample is the same always."""

import numpy as np
import pytest
import torch

from scalecv.schema import IGNORE
from scalecv.tasks import TASKS, rows
from scalecv.tasks.rows import RowSums
from tests.pair import on_two_ranks

ROWS = 12


def tiles(at, classes=3):
    """Some of twelve tiles, two of each scene, as feed, device and network give them."""
    draw = torch.Generator().manual_seed(1)
    logits, mask = torch.randn(ROWS, classes, 8, 8, generator=draw), torch.zeros(ROWS, 8, 8, dtype=torch.long)
    mask[::3, 4:9, 4:9], mask[1::3, :3], mask[:, -1] = 1, 2, IGNORE
    valid = torch.ones(len(at), dtype=torch.bool)
    ids = [f"{(7 * row % ROWS) << 60:016x}{row:016x}" for row in at]
    raw = {"id": ids, "path": [f"{row // 2}.tif#{row},0,8,8" for row in at], "valid": valid}
    return raw, {"mask": mask[at], "valid": valid}, logits[at]


def kept(at):
    found = RowSums(TASKS["segment"], ROWS, 0.5)
    for first in range(0, len(at), 4):
        found.add(*tiles(at[first : first + 4]))
    return {name: values.tolist() for name, values in found.gathered().items()}


def of_rank(rank):
    return kept([0, 1, 2, 3, 8, 9] if rank == 0 else [4, 5, 6, 7, 10, 11])


def test_two_ranks_keep_what_one_does(tmp_path):
    alone = kept(list(range(ROWS)))
    assert on_two_ranks(of_rank, tmp_path) == [alone, alone]
    assert alone["id"] == sorted(alone["id"]) and sorted(set(alone["scene"])) == [f"{at}.tif" for at in range(6)]
    whole = np.zeros(9, int)
    np.add.at(whole, alone["cell"], alone["count"])
    _, batch, logits = tiles(list(range(ROWS)))
    assert whole.reshape(3, 3).tolist() == TASKS["segment"].score(logits, batch)["confusion"].tolist()
    assert sum(alone["cells"]) == len(alone["cell"]) and kept([]) == {}


def test_a_sample_of_many_rows_is_that_of_the_lowest_ids(monkeypatch):
    monkeypatch.setattr(rows, "MOST_ROWS", 3)
    raw, batch, logits = tiles(list(range(ROWS)))
    raw["valid"] = batch["valid"] = torch.arange(ROWS) != 0
    raw["id"] = [f"{row * 2**64 // ROWS:016x}{0:016x}" for row in range(ROWS)]
    found = RowSums(TASKS["segment"], ROWS, 0.5)
    found.add(raw, batch, logits)
    assert found.gathered()["id"].astype(str).tolist() == raw["id"][1:3], "a quarter of the ids, but for the filler"


@pytest.mark.parametrize("threshold", [0.25, 0.5])
def test_two_classes_are_told_apart_at_the_threshold(threshold):
    draw = torch.Generator().manual_seed(2)
    logits, label = torch.randn(9, 2, generator=draw), torch.arange(9) % 2
    found = TASKS["classify"].rows(logits, {"label": label}, threshold)
    second = torch.softmax(logits, 1)[:, 1]
    assert found["prediction"].tolist() == (second >= threshold).long().tolist()
    torch.testing.assert_close(found["probability"], torch.where(label == 1, second, 1 - second))


def test_images_without_data_have_no_psnr():
    task, tile = TASKS["upscale"], torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 32, 32, dtype=torch.int64)
    mask[0, :, :16], mask[1] = IGNORE, IGNORE
    batch = task.prepare({"image": tile, "mask": mask, "valid": torch.ones(2, dtype=torch.bool)})
    found, sums = task.rows(tile + 0.1, batch), task.score(tile + 0.1, batch)
    assert found["pixels"].tolist() == [512, 0] and found["psnr"].isnan().tolist() == [False, True]
    assert found["psnr"][0] == sums["psnr"] and found["ssim"][0] == sums["ssim"]
