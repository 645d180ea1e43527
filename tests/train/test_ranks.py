"""What one rank learns and scores, two learn and score: masks with pixels that do not count, tiles by prevalence."""

from pathlib import Path

import numpy as np
import pytest
import rasterio

from scalecv.artifacts import spool
from scalecv.shards.ingest import IngestOptions, ingest
from tests import make
from tests.train import ranks

NODATA, HOLE = 7, np.zeros((32, 32), bool)
HOLE[:5, :7] = True


@pytest.fixture(scope="module")
def holed(tmp_path_factory):
    """Fields whose tiles say that a corner has no data; 24 tiles, of which train does not divide by the batch."""
    folder = tmp_path_factory.mktemp("holed")
    for path in make.fields(folder / "tiles").glob("*/images/*"):
        with rasterio.open(path, "r+") as tile:
            pixels = tile.read()
            pixels[:, HOLE] = NODATA
            tile.write(np.ascontiguousarray(pixels))
            tile.nodata = NODATA
    ingest(IngestOptions(source=str(folder / "tiles"), to=str(folder / "data"), layout="masks", concurrency=0))
    return str(folder / "data")


def test_one_and_two_ranks_learn_and_score_masks_alike(fields, holed, tmp_path):
    keys = {
        "data__uri": holed,
        "train__exact": True,
        "model__norm": "group",
        "data__sampling__positive": 0.5,
        "train__epochs": 1,
    }
    told = []
    for count in (1, 2):
        experiment = fields(name=f"on{count}", **keys)
        ends, said = ranks.ended(ranks.start(experiment, count, tmp_path))
        assert ends == [0] * count, said
        events = spool.read(next((tmp_path / "runs" / f"on{count}").rglob("spool.jsonl")))[0]
        scores = [
            {name: value for name, value in event["metrics"].items() if name.startswith("val/")}
            for event in events
            if event["kind"] == "metrics"
        ]
        hashes = {k: v for event in events for k, v in event.get("tags", {}).items() if "hash" in k}
        told.append(([one for one in scores if one], hashes))
    assert told[0] == told[1]
    assert {"data/order_hash", "weights_hash"} <= set(told[0][1]) and told[0][0]
    masks = [rasterio.open(path).read(1) for path in (Path(holed).parent / "tiles" / "val" / "masks").iterdir()]
    counted = np.stack(masks).astype(bool)[:, ~HOLE]
    assert told[0][0][-1]["val/trivial_accuracy"] == pytest.approx(1 - counted.mean(), abs=1e-9)
