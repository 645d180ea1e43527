import csv

import numpy as np
import PIL.Image
import pytest

from scalecv.shards.decode import REASONS, BadImage, decode_image, decode_mask, decode_pixels
from tests.shards.images import encoded, png
from tests.test_raster import tiff

SHAPES = {  # height, width, bands and dtype as files.csv describes them
    "gray8.png": (60, 80, 1, "uint8"),
    "gray_alpha.png": (60, 80, 2, "uint8"),
    "gray16.png": (60, 80, 1, "uint16"),
    "palette.png": (60, 80, 3, "uint8"),
    "bilevel.png": (60, 80, 1, "uint8"),
    "rgba.png": (60, 80, 4, "uint8"),
    "cmyk.jpg": (120, 160, 3, "uint8"),
    "exif_rotated.jpg": (160, 120, 3, "uint8"),
    "animated.gif": (60, 80, 3, "uint8"),
    "bitmap.bmp": (60, 80, 3, "uint8"),
    "webp_named.jpg": (60, 80, 3, "uint8"),
    "nan_float32.tif": (64, 64, 1, "float32"),
    "three_bands.tif": (64, 64, 3, "uint8"),
}


def test_bad_files_decode_or_tell_a_reason(shared_data):
    folder = shared_data("bad")
    with (folder / "files.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 40
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        if row["expect"] == "reject" and not row["file"].startswith("mask_"):
            with pytest.raises(BadImage) as caught:
                decode_image(data)
            assert caught.value.reason in REASONS
        else:
            assert decode_image(data).pixels.ndim == 3


@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_of_pixel_comes_out_as_it_is_meant(shared_data, name):
    pixels = decode_pixels((shared_data("bad") / name).read_bytes())
    assert (*pixels.shape, str(pixels.dtype)) == SHAPES[name]


def test_pixels_are_those_that_were_written():
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(decode_pixels(encoded(PIL.Image.fromarray(pixels), "PNG")), pixels)
    deep = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    np.testing.assert_array_equal(decode_pixels(encoded(PIL.Image.fromarray(deep), "PNG"))[..., 0], deep)
    raster = decode_image(tiff(pixels.astype(np.int16) - 30, nodata=-1))
    np.testing.assert_array_equal(raster.pixels, pixels.astype(np.int16) - 30)
    assert (raster.format, raster.nodata) == ("TIFF", -1.0)


def test_one_bit_is_black_and_white():
    stripes = PIL.Image.new("1", (8, 2))
    stripes.putpixel((3, 0), 1)
    assert decode_pixels(encoded(stripes, "PNG"))[0, :, 0].tolist() == [0, 0, 0, 255, 0, 0, 0, 0]


def test_formats_that_are_not_on_the_list_are_refused():
    for kind in ("PPM", "ICO", "TGA", "PDF"):
        with pytest.raises(BadImage):
            decode_image(encoded(PIL.Image.new("RGB", (16, 16)), kind))
    with pytest.raises(BadImage, match="unsupported"):
        decode_image(tiff(np.zeros((4, 4, 1), np.complex64)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_promises_too_much_is_not_believed():
    from scalecv.shards import decode

    wide = encoded(PIL.Image.new("1", (20_000, 7_000)), "PNG")
    with pytest.raises(BadImage, match="too_large") as caught:
        decode_image(wide)
    assert str(decode.MAX_PIXELS) in caught.value.detail


def test_masks_give_the_stored_numbers():
    palette = PIL.Image.new("P", (4, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2, 1])
    assert decode_mask(encoded(palette, "PNG")).tolist() == [[0, 1, 2, 1]]
    one_bit = PIL.Image.new("1", (3, 1))
    one_bit.putpixel((1, 0), 1)
    assert decode_mask(encoded(one_bit, "PNG")).tolist() == [[0, 1, 0]]
    assert decode_mask(tiff(np.array([[[1.0], [7.0]]], np.float32))).tolist() == [[1, 7]]
    grey = np.repeat(np.array([[[0], [5]]], np.uint8), 3, axis=-1)
    assert decode_mask(encoded(PIL.Image.fromarray(grey), "PNG")).tolist() == [[0, 5]]


def test_masks_of_colours_or_fractions_are_refused():
    with pytest.raises(BadImage, match="bands that differ"):
        decode_mask(png(1))
    with pytest.raises(BadImage, match="not whole"):
        decode_mask(tiff(np.full((2, 2, 1), 0.5, np.float32)))


def test_no_input_is_read_as_a_file_name(tmp_path):
    (tmp_path / "x.png").write_bytes(png(1))
    with pytest.raises(BadImage):
        decode_image(str(tmp_path / "x.png").encode())
