"""Changes of values, band by band: in units of each band, whole masks, missing pixels left alone."""

import io

import numpy as np
import pytest
import torch

from scalecv.batches.pixels import Pixels
from scalecv.batches.radiometry import change_bands
from scalecv.batches.samples import sample
from scalecv.batches.transforms import draws
from scalecv.config import Augment
from scalecv.errors import ConfigError
from scalecv.schema import IGNORE
from scalecv.train.checks import check
from tests.small import fields, fields_dataset  # noqa: F401 - fixtures

ALL = Augment(noise=0.5, blur_px=2.0, band_gain=0.3, band_offset=0.5, band_drop=0.5)
KINDS = [(torch.uint8, 100, 20), (torch.int16, -500, 200), (torch.float32, 0.2, 0.1)]


def picture(dtype, mean, std, size=32):
    values = torch.randn(3, size, size, generator=torch.Generator().manual_seed(1)) * std + mean
    return values.to(dtype)


@pytest.mark.parametrize(("dtype", "mean", "std"), KINDS)
@pytest.mark.parametrize("number", range(4))
def test_any_dtype_keeps_its_dtype_and_follows_its_draws_alone(dtype, mean, std, number):
    image, u = picture(dtype, mean, std), draws(0, number, "a")
    before = image.clone()
    one = change_bands(image, ALL, u, [mean] * 3, [std] * 3)
    assert one.dtype == dtype and one.shape == image.shape and torch.equal(image, before)
    assert torch.equal(one, change_bands(image, ALL, u, [mean] * 3, [std] * 3))
    assert not torch.equal(one, change_bands(image, ALL, draws(1, number, "a"), [mean] * 3, [std] * 3))
    assert (one.float() - mean).abs().max() < 12 * std


def test_noise_is_as_strong_as_each_band_is_wide():
    image = torch.zeros(2, 256, 256)
    u = draws(0, 0, "a")
    noisy = change_bands(image, Augment(noise=1.0), u, [0.0, 0.0], [1.0, 100.0])
    assert noisy[0].std() == pytest.approx(u[19], rel=0.02) and noisy[1].std() == pytest.approx(100 * u[19], rel=0.02)
    assert abs(noisy[0].mean()) < 0.02 and float((noisy[0] / u[19]).pow(4).mean()) == pytest.approx(2.85, abs=0.1)
    assert abs(float((noisy[0] * noisy[1]).mean())) < 1, "bands have noise of their own"


def test_bands_change_each_by_itself():
    image = torch.full((3, 8, 8), 50, dtype=torch.int16)
    shifted = change_bands(image, Augment(band_offset=1.0), draws(0, 0, "a"), [50] * 3, [1000.0] * 3)
    assert len({int(band[0, 0]) for band in shifted}) == 3


def test_one_band_is_dropped_to_its_mean():
    image = picture(torch.float32, 5, 2)
    dropped = change_bands(image, Augment(band_drop=1.0), draws(0, 0, "a"), [7.0, 8.0, 9.0], [1.0] * 3)
    gone = [band for band in range(3) if not torch.equal(dropped[band], image[band])]
    assert len(gone) == 1 and (dropped[gone[0]] == 7.0 + gone[0]).all()


def test_a_blur_keeps_the_mean_and_takes_nothing_from_missing_pixels():
    image = torch.full((1, 32, 32), 10.0)
    missing = torch.zeros(32, 32, dtype=torch.bool)
    missing[8:20, 8:20] = True
    image[:, missing] = -9999.0
    how = Augment(blur_px=3.0, noise=0.0)
    blurred = change_bands(image, how, np.full(24, 0.9), [0.0], [1.0], missing)
    assert (blurred[:, missing] == -9999).all() and torch.allclose(blurred[:, ~missing], torch.tensor(10.0))
    assert not torch.allclose(change_bands(image, how, np.full(24, 0.9), [0.0], [1.0])[:, ~missing], torch.tensor(10.0))


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
@pytest.mark.parametrize("number", range(3))
def test_masks_stay_whole_and_nodata_stays_missing(dtype, number):
    """Nodata of -9 (0 for unsigned) in a corner: after any change the corner is at the mean, and counts nowhere."""
    nodata = 0 if dtype == "uint16" else -9
    rng = np.random.default_rng(number)
    pixels = rng.normal(1000, 100, (4, 32, 32)).astype(dtype)
    pixels[:, :12, :12] = nodata
    mask = rng.integers(0, 3, (32, 32)).astype(np.uint8)
    how = Pixels(
        bands=None, color="native", channels=4, dtype="int16" if dtype == "int16" else "float32", source_dtype=dtype,
        size_px=None, resize="stretch", mean=(1000.0,) * 4, std=(100.0,) * 4, classes=("a", "b", "c"),
        mask_values=(0, 1, 2), augment=ALL.model_copy(update={"hflip": 0.5, "rot90": True}),
    )  # fmt: skip
    image, target = sample(tiff(pixels), tiff(mask[None]), nodata, how, draws(0, number, "x"))
    assert set(target.unique().tolist()) <= {0, 1, 2, IGNORE}
    gone = target == IGNORE
    assert int(gone.sum()) == 144 and (image[:, gone] == 1000).all()
    assert (image[:, ~gone] != 1000).float().mean() > 0.4


def tiff(bands):
    import rasterio

    out = io.BytesIO()
    profile = {"driver": "GTiff", "width": 32, "height": 32, "count": len(bands), "dtype": bands.dtype}
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(bands)
        out.write(memory.read())
    return out.getvalue()


def test_what_makes_no_sense_is_refused(fields, fields_dataset):  # noqa: F811
    from scalecv.shards.store import open_dataset

    manifest = open_dataset(fields_dataset).manifest
    check(fields(data__augment__band_drop=0.2, data__augment__rot90=True), manifest)
    with pytest.raises(ConfigError, match="give one band"):
        check(fields(data__augment__band_drop=0.2, data__bands=[4]), manifest)
    wide = manifest.model_copy(update={"sizes_px": (64, 32, 64, 32)})
    with pytest.raises(ConfigError, match="64x32 to 32x64"):
        check(fields(data__augment__rot90=True), wide)
