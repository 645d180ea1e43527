"""JPEGs decode by another road than Pillow's and arrive at the same pixels."""

import io

import numpy as np
import PIL.Image
import pytest

from scalecv.jpeg import turbo
from scalecv.shards import decode
from tests.shards.images import encoded


def picture(height, width, mode="RGB", seed=0):
    """Smooth, with edges: what subsampled colour is interpolated from matters."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / rng.uniform(2, 9) + y / rng.uniform(2, 9) + k) for k in range(3)]
    pixels = np.stack(waves, -1).astype(np.uint8)
    pixels[height // 3 :, width // 2 :] = (250, 10, 40)
    return PIL.Image.fromarray(pixels).convert(mode)


def by_pillow(data):
    return decode.decode_image(data).pixels


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("more", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 20}])
def test_the_pixels_are_pillows_and_rows_above_a_cut_do_not_change(subsampling, more):
    for seed, (height, width) in enumerate([(61, 47), (64, 32), (17, 90), (1, 1)]):
        data = encoded(picture(height, width, seed=seed), "JPEG", subsampling=subsampling, **more)
        known = turbo.header(data)
        whole = by_pillow(data)
        assert (known.height, known.width, known.channels) == whole.shape
        np.testing.assert_array_equal(turbo.decode(data, known), whole)
        for rows in range(1, height + 1):
            np.testing.assert_array_equal(turbo.decode(data, known, rows)[:rows], whole[:rows])
    if not more.get("progressive"):
        data = encoded(picture(64, 32), "JPEG")
        assert len(turbo.decode(data, turbo.header(data), 8)) < 64


def test_gray_is_one_channel():
    data = encoded(picture(20, 30, "L"), "JPEG")
    np.testing.assert_array_equal(turbo.decode(data, turbo.header(data)), by_pillow(data))
    assert decode.decode_pixels(data).shape == (20, 30, 1)


def test_what_is_out_of_the_ordinary_is_left_to_pillow():
    plain = picture(40, 24)
    turned = plain.getexif()
    turned[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    for data in (
        encoded(plain, "JPEG", exif=turned),
        encoded(plain, "JPEG", xmp=xmp),
        encoded(plain.convert("CMYK"), "JPEG"),
        encoded(plain, "PNG"),
        b"",
    ):
        assert turbo.header(data) is None
    data = encoded(plain, "JPEG")
    for size in range(data.index(b"\xff\xda") + 3):
        assert turbo.header(data[:size]) is None
    assert decode.decode_pixels(encoded(plain, "JPEG", exif=turned)).shape == (24, 40, 3)
    upright = plain.getexif()
    upright[0x0112], upright[0x010F] = 1, "a camera"
    data = encoded(plain, "JPEG", exif=upright)
    np.testing.assert_array_equal(turbo.decode(data, turbo.header(data)), by_pillow(data))


def test_rgb_in_the_file_stays_rgb():
    data = encoded(picture(40, 24), "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(turbo.decode(data, turbo.header(data)), by_pillow(data))


def test_bytes_that_libjpeg_warns_about_are_pillows_to_judge():
    data = encoded(picture(64, 64), "JPEG")
    cut = data[: len(data) * 2 // 3]
    assert turbo.decode(cut, turbo.header(cut)) is None
    with pytest.raises(decode.BadImage, match="truncated"):
        decode.decode_pixels(cut)
    behind = data[:-2] + b"\0" * 100 + data[-2:]  # some cameras write so
    np.testing.assert_array_equal(decode.decode_pixels(behind), np.asarray(PIL.Image.open(io.BytesIO(behind))))


def test_all_pictures_of_the_collection_agree(shared_data):
    files = [path for path in shared_data("bad").iterdir() if path.suffix == ".jpg"]
    seen = 0
    for path in files:
        data = path.read_bytes()
        known = turbo.header(data)
        if known is not None and (pixels := turbo.decode(data, known)) is not None:
            np.testing.assert_array_equal(pixels, by_pillow(data))
            seen += 1
    assert seen
