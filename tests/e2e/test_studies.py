"""Real tiles, whole experiments: what the shipped YAML reaches against what it has to beat. Minutes each."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scalecv import config, raster
from scalecv.serve.evaluate import evaluate
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.train.run import train

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(3000)]
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FIVE = {"unet": "batch", "unetplusplus": "batch", "pspnet": "group", "fpn": "group", "deeplabv3plus": "group"}
"""With the normalisation that carries each to another place (docs/experiments.md)."""
SEEDS = (0, 1, 2)


def ingested(folder, to, *, test="test"):
    """The tiles as a dataset; all of `train` trains, `test` is scored once."""
    splits = {} if test == "test" else {test: "test"}
    ingest(IngestOptions(source=str(folder), to=str(to), layout="masks", split="100/0/0", split_folders=splits))
    return str(to)


def run(file, folder, **keys):
    """Train a shipped experiment in a folder of its own, and score its bundle on `test`."""
    given = {"scale.workers": 0, "track.storage": str(folder / "runs"), "track.uri": f"sqlite:///{folder}/mlruns.db"}
    experiment = config.load(str(EXPERIMENTS / file), given | {key.replace("__", "."): v for key, v in keys.items()})
    result = train(experiment)
    return evaluate(result.bundle, experiment.data.uri, split="test").metrics


def pixels(folder):
    """(bands [n, h, w, c] float32, masks [n, h, w] bool) of the tiles below a folder."""
    files = sorted((folder / "images").iterdir())
    images = np.stack([raster.read(path.read_bytes())[0] for path in files])
    masks = np.stack([raster.read((folder / "masks" / path.name).read_bytes())[0] for path in files])
    return images.astype(np.float32), masks[..., 0] > 0


COLOURS = {
    "red": lambda image: image[..., 0],
    "green": lambda image: image[..., 1],
    "blue": lambda image: image[..., 2],
    "brightness": lambda image: image[..., :3].mean(-1),
    "blue - red": lambda image: image[..., 2] - image[..., 0],
    "share of blue": lambda image: image[..., 2] / (image[..., :3].sum(-1) + 1),
}


def overlap(found, truth):
    return (found & truth).sum() / (found | truth).sum()


def threshold_iou(folder):
    """IoU in the other place of the one colour, and its threshold to one side, that fit the training tiles best."""
    images, masks = pixels(folder / "train")
    others, truth = pixels(folder / "other_place")
    best = (0.0, 0.0)
    for colour in COLOURS.values():
        values = colour(images)
        for edge in np.quantile(values, np.linspace(0.02, 0.98, 49)):
            for is_above in (True, False):
                fits = overlap((values >= edge) == is_above, masks)
                best = max(best, (fits, overlap((colour(others) >= edge) == is_above, truth)))
    return best[1]


@pytest.mark.parametrize("arch", FIVE)
def test_panels_of_another_place_are_found_better_than_by_colour(shared_data, tmp_path, arch):
    folder = shared_data("pv4band")
    data = ingested(folder, tmp_path / "pv", test="other_place")
    metrics = run("pv_unet.yaml", tmp_path, data__uri=data, model__arch=arch, model__norm=FIVE[arch])
    to_beat = threshold_iou(folder)
    print(f"{arch} {metrics['test/iou']:.4f}, by colour {to_beat:.4f}")
    assert metrics["test/iou"] > 2 * to_beat > metrics["test/trivial_iou"] == 0


def test_water_is_found_as_well_as_by_a_plain_script(shared_data, tmp_path):
    folder = shared_data("water12")
    data = ingested(folder, tmp_path / "water")
    ours, plain = [], []
    for seed in SEEDS:
        ours.append(run("water_unet.yaml", tmp_path, data__uri=data, seed=seed, name=f"water-{seed}")["test/iou"])
        command = [sys.executable, "-m", "tests.reference.plain_segmentation", folder, "--seed", str(seed), "--json"]
        plain.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["iou"])
    print(ours, plain)
    noise = (statistics.variance(ours) / len(SEEDS) + statistics.variance(plain) / len(SEEDS)) ** 0.5
    assert statistics.mean(ours) >= statistics.mean(plain) - 2 * noise
