"""What an experiment's augmentation makes of some rows, as a picture to look at before a run."""

import io

import numpy as np
from numpy.typing import NDArray

from scalecv.batches.collate import Row
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import Pixels, pixels_of
from scalecv.batches.samples import sample
from scalecv.batches.transforms import draws
from scalecv.config import Experiment
from scalecv.schema import IGNORE
from scalecv.shards.store import Dataset

TILE_PX = 160
GAP_PX = 4
FOREGROUND, IGNORED = (255, 64, 64), (128, 128, 128)


def augmented_png(dataset: Dataset, experiment: Experiment, rows: int = 4, variants: int = 4) -> bytes:
    """Rows of the training split as they are, and beside each what training sees in the first epochs.

    Foreground of masks lies over the image in red, pixels that count nowhere in grey. Values other than uint8 are shown
    from two standard deviations below to two above the mean of each band, the same for all variants.
    """
    import PIL.Image

    pixels = pixels_of(dataset.manifest, experiment.data, dataset.uri)
    some = Feed(dataset, "train", pixels, rows, is_training=True).some_rows(rows)
    step = TILE_PX + GAP_PX
    sheet = PIL.Image.new("RGB", ((1 + variants) * step + GAP_PX, len(some) * step), "white")
    for down, row in enumerate(some):
        for across in range(1 + variants):
            u = draws(experiment.seed, across - 1, row.id) if across else None
            tile = PIL.Image.fromarray(_picture(row, pixels, u))
            x = across * step + (GAP_PX if across else 0)  # a wider gap after what nothing was done to
            sheet.paste(tile.resize((TILE_PX, TILE_PX), PIL.Image.Resampling.NEAREST), (x, down * step))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _picture(row: Row, pixels: Pixels, u: np.ndarray | None) -> NDArray[np.uint8]:
    """[H, W, 3]."""
    image, mask = sample(row.image, row.mask, row.nodata, pixels, u)
    values = image.float().permute(1, 2, 0).numpy()
    if pixels.dtype != "uint8":
        mean, std = np.array(pixels.mean, np.float32), np.array(pixels.std, np.float32)
        values = (values - mean) / (4 * std) * 255 + 127.5
    shown = values[..., :3] if values.shape[-1] >= 3 else np.repeat(values[..., :1], 3, axis=-1)
    if mask is not None:
        for here, colour in ((mask.numpy() > 0, FOREGROUND), (mask.numpy() == IGNORE, IGNORED)):
            shown = np.where(here[..., None], 0.6 * shown + 0.4 * np.array(colour), shown)
    return np.asarray(np.clip(shown, 0, 255).astype(np.uint8))
