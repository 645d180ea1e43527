"""Variants of one experiment in turns; what is measured is not asserted, only that all of it is there."""

import json
import subprocess
import sys

import pytest

from scalecv.speed.upscale import compare


def test_every_variant_has_cost_memory_and_quality(fields, tmp_path):
    experiment = fields(model__arch="pspnet", train__batch=4, data__size_px=16)
    before = {path.name for path in tmp_path.iterdir()}
    found = compare(experiment, [1, 2], rounds=1, seconds=0.0, epochs=1)
    assert [(row.factor, row.method) for row in found.rows] == [(1, "native"), (2, "bicubic")]
    assert found.metric == "val/iou" and found.rows[0].per_pixel == 1.0
    for row in found.rows:
        assert row.step_s > 0 and row.epoch_s > 0 and row.memory_gb >= 0 and row.micro_batch == 4
        assert row.quality is not None and 0 <= row.quality <= 1 and row.per_hour >= row.quality
    assert len({len(line) for line in found.lines()}) == 1 and len(found.lines()) == 3
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upscale", "nowhere.yaml"], "no experiment at nowhere.yaml"),
        (["nowhere.yaml"], "no experiment at nowhere.yaml"),
    ],
)
def test_the_word_for_parts_may_be_left_out(words, said):
    done = subprocess.run([sys.executable, "-m", "scalecv", "bench", *words, "--json"], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and json.loads(done.stdout)["exit_code"] == 2
