"""A JPEG's sums by C are those by simplejpeg, and both say the same of damaged bytes."""

import numpy as np
import PIL.Image
import pytest
import simplejpeg

from scalecv.batches import crops
from scalecv.jpeg import build, native, turbo
from scalecv.shards import jpeg_sums
from scalecv.shards.examine import examine
from scalecv.shards.examiner import Examiner
from tests.jpeg.test_turbo import picture
from tests.shards.images import encoded

needs_native = pytest.mark.skipif(jpeg_sums.by_c() is None, reason=crops.state())
KINDS = (
    {"quality": 88},
    {"quality": 60, "subsampling": 0},
    {"quality": 75, "subsampling": 1},
    {"quality": 80, "progressive": True},
    {"quality": 80, "restart_marker_rows": 1},
)


def compare(made, data):
    """Whether the file is good, by both."""
    known = turbo.header(data)
    if known is None or known.height * known.width > 1 << 22:
        return None
    where = jpeg_sums.strips(known.height, known.width, data)
    found = made(data, known, *where)
    assert found == jpeg_sums._plain(data, known, *where)
    return found is not None


@needs_native
def test_the_sums_are_those_of_simplejpeg():
    rng = np.random.default_rng(0)
    for seed in range(60):
        height, width = rng.integers(1, (40, 700)[seed % 2], 2).tolist()
        drawn = np.ascontiguousarray(picture(height, width, seed=seed))
        sampling = ("444", "422", "420", "440", "411")[seed % 5]
        assert compare(jpeg_sums.by_c(), simplejpeg.encode_jpeg(drawn, quality=30 + seed, colorsubsampling=sampling))
    for more in KINDS:
        for mode in ("RGB", "L"):
            assert compare(jpeg_sums.by_c(), encoded(picture(300, 400, mode), "JPEG", **more))


@needs_native
def test_the_same_without_vector_instructions(tmp_path):
    build.compile_native(tmp_path / "plain.so", "-O1", "-DPLAIN")
    made = jpeg_sums.Sums(native.opened(tmp_path / "plain.so"))
    for height, width in ((300, 400), (20, 33), (1000, 7)):
        assert compare(made, encoded(picture(height, width), "JPEG"))


@needs_native
def test_damage_is_told_wherever_it_is():
    rng = np.random.default_rng(0)
    files = [
        encoded(picture(*size, mode, seed=3), "JPEG", **more)
        for size in ((300, 400), (97, 33), (640, 40))
        for more in KINDS
        for mode in ("RGB", "L")
    ]
    told = 0
    for turn in range(900):
        data = bytearray(files[turn % len(files)])
        if turn % 3 == 0:
            del data[int(rng.integers(2, len(data))) :]
        else:
            for at in rng.integers((2, len(data) // 2)[turn % 3 - 1], len(data), 1 + turn % 7):
                data[at] ^= 1 << int(rng.integers(0, 8))
        told += compare(jpeg_sums.by_c(), bytes(data)) is False
    assert told > 300
    last_row = bytearray(files[0])
    last_row[-60:-40] = bytes(20)
    assert compare(jpeg_sums.by_c(), bytes(last_row)) is False


@needs_native
def test_no_more_than_the_given_memory_is_written(monkeypatch):
    data = encoded(picture(200, 300), "JPEG")
    address, _, out = jpeg_sums.by_c()._places
    with monkeypatch.context() as patched:
        patched.setattr(jpeg_sums.by_c(), "_places", (address, 10_000, out))
        assert jpeg_sums.by_c()(data, turbo.header(data), 0, 1) is None
    other = turbo.header(data)._replace(width=301)
    assert jpeg_sums.by_c()(data, other, 0, 1) is None, "the file is another than was said"


def test_over_many_images_all_heights_count_alike():
    ramp = np.repeat(np.linspace(0, 255, 300).astype(np.uint8)[:, None, None], 400, axis=1).repeat(3, axis=2)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(200):
        noisy = np.clip(ramp + rng.normal(0, 9, ramp.shape), 0, 255).astype(np.uint8)
        facts = examine("a.jpg", encoded(PIL.Image.fromarray(noisy), "JPEG"))
        assert 0.15 < facts["pixels"] / 120_000 < 0.35
        means.append(facts["mean"][0])
    assert np.mean(means) == pytest.approx(127.5, abs=3)  # 200 drawn from four means some 20 apart


def test_an_image_of_one_colour_but_for_rows_that_were_not_counted():
    for at in range(0, 300, 16):
        pixels = np.full((300, 400, 3), 90, np.uint8)
        pixels[at : at + 4] = 200
        assert "constant" not in examine("a.jpg", encoded(PIL.Image.fromarray(pixels), "JPEG"))["notes"]
    plain = encoded(PIL.Image.new("RGB", (400, 300), (90, 90, 90)), "JPEG")
    assert examine("a.jpg", plain)["notes"] == {"constant": "every pixel is 90, 90, 90"}


@needs_native
def test_the_child_has_it_and_gives_the_same_without(monkeypatch):
    data = encoded(picture(300, 400), "JPEG")
    answers = []
    for switch in ("1", "0"):
        monkeypatch.setenv(native.SWITCH, switch)
        child = Examiner()
        answers.append(child.examine("a.jpg", data))
        with open(f"/proc/{child._child.process.pid}/maps") as maps:
            assert (str(native.kept_at()) in maps.read()) == (switch == "1")
        child.close()
    assert answers[0] == answers[1]
