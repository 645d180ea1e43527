"""A JPEG's sums by C are those by simplejpeg, and both say the same of damaged bytes."""

import os
import sys

import numpy as np
import PIL.Image
import pytest
import simplejpeg

from scalecv.jpeg import build, native, turbo
from scalecv.shards import jpeg_sums
from scalecv.shards.decode import BadImage
from scalecv.shards.examine import examine, of_plain, plain
from scalecv.shards.examiner import Examiner
from tests.jpeg.test_turbo import picture
from tests.shards.images import encoded

needs_native = pytest.mark.skipif(jpeg_sums.by_c() is None, reason="there is no native library here, or it was refused")
needs_compiler = pytest.mark.skipif(build.missing() != "", reason="no compiler, or no headers of libjpeg-turbo")
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
    numbers = made(data, known, *where)
    found = None if numbers is None else jpeg_sums.of_numbers(numbers)
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


@needs_compiler
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
def test_what_is_told_in_numbers_is_what_all_of_it_says():
    ordinary = encoded(picture(300, 400), "JPEG")
    gray = encoded(picture(31, 40, "L"), "JPEG")
    for data in (ordinary, gray):
        numbers = plain("a.JPG", data)
        assert numbers is not None and of_plain(numbers) == examine("a.JPG", data)
    assert plain("a.png", ordinary) is None, "its name is to be told"
    assert plain("a.jpg", encoded(picture(2, 90), "JPEG")) is None, "its shape is"
    assert plain("a.jpg", encoded(PIL.Image.new("RGB", (40, 30), (9, 9, 9)), "JPEG")) is None, "its one colour is"
    assert plain("a.jpg", ordinary[:-900]) is None
    assert plain("a.jpg", encoded(picture(30, 40), "PNG")) is None


@needs_native
def test_wherever_its_memory_lies_the_sums_are_the_same_and_nothing_beside_it_is_written():
    data = encoded(picture(300, 400), "JPEG")
    known, size = turbo.header(data), 14 * 1216 + 128
    made = jpeg_sums.Sums.__new__(jpeg_sums.Sums)
    made._sum, made._out = jpeg_sums.by_c()._sum, np.zeros(13, np.uint64)
    for start in range(0, 64, 8):
        memory = np.full(size + 256, 77, np.uint8)
        first = memory[128 + start :][:size]
        made._places = first.ctypes.data, size, made._out.ctypes.data
        assert made(data, known, 0, 1) == jpeg_sums.by_c()(data, known, 0, 1)
        assert (memory[: 128 + start] == 77).all() and (memory[128 + start + size :] == 77).all()


def maps_of(child):
    with open(f"/proc/{child._child.process.pid}/maps") as maps:
        return [line for line in maps if "/native/jpeg-" in line or build.SHIPPED.name in line]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc that tells of libraries")
@needs_native
def test_the_child_has_it_and_gives_the_same_without(monkeypatch):
    data = encoded(picture(300, 400), "JPEG")
    answers = []
    for switch in ("1", "0"):
        monkeypatch.setenv(native.SWITCH, switch)
        child = Examiner()
        answers.append(child.examine("a.jpg", data))
        assert bool(maps_of(child)) == (switch == "1")
        child.close()
    assert answers[0] == answers[1]


@pytest.mark.skipif(build.SHIPPED.exists(), reason="a library of the package comes before the one in the cache")
@needs_compiler
def test_a_library_that_ends_its_process_is_done_without(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.kept_at().parent.mkdir(parents=True, mode=0o700)
    build.compile_native(native.kept_at())
    os.truncate(native.kept_at(), native.kept_at().stat().st_size // 2)
    child = Examiner()
    facts = child.examine("a.jpg", encoded(picture(300, 400), "JPEG"))
    child.close()
    assert child.examine("a.jpg", encoded(picture(300, 400), "JPEG")) == facts
    child.close()
    assert len(caplog.records) == 1, "which is not tried again"
    assert facts == examine("a.jpg", encoded(picture(300, 400), "JPEG"))
    assert "does not start with native code (ended with signal" in caplog.text and str(tmp_path) in caplog.text


def with_segments(*profile):
    """A good file with the parts of a colour profile: number, of how many, bytes."""
    data = encoded(picture(64, 64), "JPEG")
    parts = [b"ICC_PROFILE\0" + bytes([number, count]) + more for number, count, more in profile]
    return data[:2] + b"".join(b"\xff\xe2" + (len(part) + 2).to_bytes(2, "big") + part for part in parts) + data[2:]


@pytest.mark.parametrize("profile", [[(0, 1, b"p")], [(2, 1, b"p")], [(1, 2, b"p")], [(1, 1, b"")], [(1, 1, b"p")] * 2])
def test_a_torn_colour_profile_is_no_damage(profile):
    assert turbo.header(with_segments(*profile)) is None
    assert examine("a.jpg", with_segments(*profile))["notes"] == {}
    good = with_segments((2, 2, b"q"), (1, 2, b"p"))
    assert turbo.header(good) is not None and turbo.decode(good, turbo.header(good)) is not None


def test_odd_sampling_of_colours_is_no_damage():
    data = bytearray(encoded(picture(64, 64), "JPEG", subsampling=0))
    at = data.index(b"\xff\xc0") + 11
    data[at : at + 9 : 3] = b"\x22\x22\x22"  # 4:4:4, said in another way
    assert turbo.header(bytes(data)) is None
    data[at : at + 9 : 3] = b"\x11\x11\x11"
    assert turbo.header(bytes(data)) is not None


def test_a_file_without_width_is_bad():
    data = bytearray(encoded(picture(64, 64), "JPEG"))
    at = data.index(b"\xff\xc0") + 7
    data[at : at + 2] = bytes(2)
    with pytest.raises(BadImage, match="damaged"):
        examine("a.jpg", bytes(data))


def test_metadata_in_the_middle_does_not_choose_the_rows():
    rng = np.random.default_rng(0)
    chosen = []
    for _ in range(200):
        noisy = PIL.Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).resize((256, 256))
        data = encoded(noisy, "JPEG", quality=60, comment=b" " * 60_000)
        first, step = jpeg_sums.strips(256, 256, data)
        assert step == 4
        chosen.append(first)
    assert min(np.bincount(chosen, minlength=4)) > 30  # of 50, standard deviation 6
