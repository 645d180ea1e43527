"""What pixels become, from the facts of a dataset."""

import shutil

import numpy as np
import torch

from scalecv import raster
from scalecv.batches.collate import to_device
from scalecv.batches.pixels import pixels_of
from scalecv.config import Data
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset


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
