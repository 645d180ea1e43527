import csv
import signal
import threading
import time

import numpy as np
import PIL.Image
import pytest
import rasterio

from scalecv.shards.band_sums import band_sums
from scalecv.shards.decode import BadImage, decode_image, decode_pixels
from scalecv.shards.examine import NOTES, examine
from scalecv.shards.examiner import Examiner
from scalecv.shards.record import BandSums
from tests.shards.images import encoded, png
from tests.test_raster import tiff


@pytest.fixture(scope="module")
def examiner():
    child = Examiner()
    yield child
    child.close()


def test_files_to_warn_of_get_a_note_and_good_ones_get_none(shared_data, examiner):
    folder = shared_data("bad")
    with (folder / "files.csv").open(newline="") as table:
        rows = [r for r in csv.DictReader(table) if not r["file"].startswith("mask_")]
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        if row["expect"] == "reject":
            with pytest.raises(BadImage):
                examiner.examine(row["file"], data)
            continue
        notes = examiner.examine(row["file"], data)["notes"]
        assert set(notes) <= set(NOTES)
        # That three bands are too few is a fact of the dataset around the file: see test_ingest.
        assert bool(notes) == (row["expect"] == "warn" and row["file"] != "three_bands.tif"), (row["file"], notes)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_sums_add_up_to_numpys_over_images_of_all_sizes(dtype):
    rng = np.random.default_rng(0)
    parts = [(rng.random((n, 3)) * 255 + 1e4 * (dtype != "uint8")).astype(dtype) for n in (1, 50, 7, 4000)]
    total = None
    for part in parts:
        sums = BandSums(rows=1, **band_sums(part))
        total = sums if total is None else total.plus(sums)
    joined = np.concatenate(parts).astype(np.float64)
    stats = total.stats()
    assert (stats.rows, stats.pixels) == (4, 4058)
    np.testing.assert_allclose(stats.mean, joined.mean(0), rtol=1e-12)  # float64, 4058 terms
    np.testing.assert_allclose(stats.std, joined.std(0), rtol=1e-9)
    assert stats.min == tuple(joined.min(0)) and stats.max == tuple(joined.max(0))


def test_nodata_in_some_bands_counts_and_is_told():
    pixels = np.full((10, 10, 2), 5, np.int16)
    pixels[0, :2, 0] = -9
    facts = examine("x.tif", tiff(pixels, nodata=-9))
    assert facts["pixels"] == 100
    assert facts["notes"]["nodata_some"] == "2 of 100 pixels are -9 in some bands only"
    pixels[0, :2] = -9
    pixels[0, 2, 0] = -9  # one in a hundred may be so by chance
    facts = examine("x.tif", tiff(pixels, nodata=-9))
    assert facts["pixels"] == 98 and "nodata_some" not in facts["notes"]


@pytest.mark.parametrize("size_px", [(8400, 1200), (1200, 8400), (640, 480), (9000, 1)])
def test_statistics_of_a_jpeg_are_those_of_all_of_it(size_px):
    rng = np.random.default_rng(0)
    pixels = np.kron(
        rng.integers(0, 200, (size_px[1] // 8 + 1, size_px[0] // 8 + 1), np.uint8), np.ones((8, 8), np.uint8)
    )
    pixels = pixels[: size_px[1], : size_px[0]].copy()
    pixels[: size_px[1] // 100] = 255  # a border
    facts = examine("a.jpg", encoded(PIL.Image.fromarray(pixels), "JPEG", quality=95))
    assert facts["pixels"] <= 0.35 * pixels.size or size_px == (9000, 1)
    assert facts["mean"][0] == pytest.approx(pixels.mean(), abs=3)
    assert (facts["m2"][0] / facts["pixels"]) ** 0.5 == pytest.approx(pixels.std(), abs=3)
    assert facts["min"][0] < 10 and facts["max"][0] > 190 and "constant" not in facts["notes"]


def test_nan_and_nodata_do_not_count():
    pixels = np.array([[[1.0], [np.nan], [-9.0], [3.0]]], np.float32)
    facts = examine("x.tif", tiff(pixels, nodata=-9))
    assert (facts["pixels"], facts["mean"], facts["min"], facts["max"]) == (2, [2.0], [1.0], [3.0])
    assert set(facts["notes"]) == {"nan"}
    dark = np.array([[[0, 0], [0, 5]]], np.uint8)  # a pixel has no data where all of its bands say so
    assert examine("x.tif", tiff(dark, nodata=0))["pixels"] == 1


def test_numbers_whose_sums_no_number_holds_are_one_images_own():
    """GDAL's usual nodata of float64, in a file that does not declare it: it ended the ingest of all others."""
    pixels = np.random.default_rng(0).normal(0, 1, (9, 9, 2))
    pixels[0] = -1.7976931348623157e308
    with pytest.raises(BadImage, match=r"unsupported: numbers from -1\.79769e\+308 to .*-a_nodata"):
        examine("a.tif", tiff(pixels))
    assert examine("a.tif", tiff(pixels, nodata=-1.7976931348623157e308))["pixels"] == 72


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_rasters_bands_lie_where_their_reader_wants_them(dtype):
    """Sums go band by band, batches pixel by pixel: either is several times slower the other way."""
    pixels = (np.random.default_rng(0).random((40, 30, 4)) * 1000).astype(dtype)
    data = tiff(pixels)
    summed, batched = decode_image(data).pixels, decode_pixels(data)
    np.testing.assert_array_equal(summed, batched)
    assert summed[..., 1].flags.c_contiguous and batched.flags.c_contiguous
    facts = examine("a.tif", data)
    by_band = [np.ascontiguousarray(pixels[..., i]).ravel() for i in range(4)]
    assert facts["mean"] == [float(band.mean(dtype=np.float64)) for band in by_band]


def test_a_mask_whose_place_is_damaged_is_the_masks_fault():
    own = rasterio.CRS.from_proj4("+proj=lcc +lat_1=3 +lat_2=9 +lon_0=5 +ellps=bessel +units=m")
    place = {"crs": own, "transform": rasterio.Affine(1, 0, 250000, 0, -1, 2700000)}
    image, mask = tiff(np.ones((8, 8, 3), np.uint8), **place), tiff(np.ones((8, 8, 1), np.uint8), **place)
    assert examine("a.tif", image, mask)["mask_values"] == {"1": 64}
    with pytest.raises(BadImage) as caught:
        examine("a.tif", image, mask.replace(b"unknown", b"\xff" * 7))
    assert caught.value.reason == "mask_damaged"


def test_masks_are_counted_and_compared():
    image, mask = png(1, (4, 2)), encoded(PIL.Image.fromarray(np.array([[0, 1, 1, 9], [0, 0, 0, 1]], np.uint8)), "PNG")
    assert examine("x.png", image, mask)["mask_values"] == {"0": 4, "1": 3, "9": 1}
    assert examine("x.png", image, mask, declared=(0, 1), ignore=9)["mask_values"]["9"] == 1
    for reason, call in {
        "mask_value": lambda: examine("x.png", image, mask, declared=(0, 1)),
        "mask_size": lambda: examine("x.png", png(1, (5, 2)), mask),
        "mask_damaged": lambda: examine("x.png", image, mask[:40]),
    }.items():
        with pytest.raises(BadImage) as caught:
            call()
        assert caught.value.reason == reason
    many = tiff(np.arange(512, dtype=np.uint16).reshape(16, 32, 1))
    with pytest.raises(BadImage, match="512 different values"):
        examine("x.png", png(1, (32, 16)), many)


def test_the_death_of_the_decoder_is_that_samples_own(examiner):
    slow = encoded(PIL.Image.new("RGB", (7000, 7000)), "PNG", compress_level=1)
    examiner.examine("x.png", png(1))

    def kill():
        time.sleep(0.1)
        examiner._child.process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(BadImage) as caught:
        examiner.examine("slow.png", slow)
    killer.join()
    assert caught.value.reason == "decoder_died" and "signal 9" in caught.value.detail
    assert examiner.examine("x.png", png(1))["width"] == 12


def test_a_decoder_that_takes_too_long_is_stopped():
    child = Examiner(timeout_s=0.05)
    with pytest.raises(BadImage) as caught:
        child.examine("slow.png", encoded(PIL.Image.new("RGB", (7000, 7000)), "PNG", compress_level=1))
    assert caught.value.reason == "timeout"
    child.close()


def test_the_child_gets_no_credentials(monkeypatch, examiner):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    child = Examiner()
    child.examine("x.png", png(1))
    with open(f"/proc/{child._child.process.pid}/environ", "rb") as environment:
        assert b"planted" not in environment.read()
    child.close()
