"""What pixels become, from the facts of a dataset."""

import shutil

import numpy as np
import rasterio
import torch

from scalecv import raster
from scalecv.batches.collate import to_device
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import pixels_of
from scalecv.config import Data
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from tests import make


def test_an_alpha_band_of_one_value_is_zero_wherever_else_it_varies(shared_data, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "s/train" / kind).mkdir(parents=True)
        for file in sorted((shared_data("pv4band") / "train" / kind).iterdir())[:3]:
            shutil.copy(file, tmp_path / "s/train" / kind)
    data = str(tmp_path / "data")
    ingest(IngestOptions(source=str(tmp_path / "s"), to=data, layout="masks", split="100/0/0", concurrency=0))
    how = pixels_of(open_dataset(data).manifest, Data(uri=data, size_px=128), data)
    assert how.sides_px == (256, 256) and how.channels == 4
    image = raster.read(next((tmp_path / "s/train/images").iterdir()).read_bytes())[0]
    other = image.copy()
    other[:40, :, 3] = 0
    both = torch.from_numpy(np.stack([image, other])).permute(0, 3, 1, 2)
    seen = to_device({"image": both}, how, torch.device("cpu"), channels_last=False)["image"]
    assert seen[:, 3].abs().max() < 1e-6 and (seen[:, :3].std((2, 3)) > 0.1).all()


def test_each_band_of_the_training_split_has_mean_0_and_deviation_1_and_nodata_is_at_0(tmp_path):
    """Bands of 16 bits whose ranges lie far apart; a corner of each tile has no data, and val is brighter."""
    factors = np.array([0.1, 1, 3, 10])[:, None, None]
    for path in make.fields(tmp_path / "s").glob("*/images/*"):
        with rasterio.open(path, "r+") as tile:
            pixels = (tile.read() * factors * (2 if "val" in path.parts else 1)).astype(np.uint16)
            pixels[:, :9, :9] = 65535
            tile.write(pixels)
            tile.nodata = 65535
    data = str(tmp_path / "data")
    ingest(IngestOptions(source=str(tmp_path / "s"), to=data, layout="masks", concurrency=0))
    dataset = open_dataset(data)
    how = pixels_of(dataset.manifest, Data(uri=data), data)
    ((_, raw),) = Feed(dataset, "train", how, batch=18).epoch(0)
    seen = to_device(raw, how, torch.device("cpu"), channels_last=False)["image"].double()
    unit = 1 / torch.tensor(how.std).view(-1, 1, 1)
    assert (seen[:, :, :9, :9].abs() < unit).all(), "to a unit of the file"
    there = torch.ones(32, 32, dtype=torch.bool)
    there[:9, :9] = False
    torch.testing.assert_close(seen[..., there].mean((0, 2)), torch.zeros(4).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[..., there].std((0, 2)), torch.ones(4).double(), atol=1e-3, rtol=0)
