"""Crops by C are those by simplejpeg and torch, bit for bit; what it cannot do, and no compiler, change nothing."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch

from scalecv import cache
from scalecv.batches import collate, crops, transforms
from scalecv.batches.collate import Row
from scalecv.errors import IntegrityError
from scalecv.jpeg import build, native, turbo
from tests.batches.test_collate import batch, pixels, rows
from tests.jpeg.test_turbo import picture
from tests.shards.images import encoded

needs_native = pytest.mark.skipif(crops.load() is None, reason=crops.state())


@pytest.fixture
def anew(monkeypatch):
    """The choice is made anew, and once more after the test."""
    crops.load.cache_clear()
    yield monkeypatch
    crops.load.cache_clear()


def compare(made, seed, most=300):
    """One random picture, box and size, by C and by simplejpeg and torch."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(8, most, 2).tolist()
    sampling = ("444", "422", "420", "440", "411")[seed % 5]
    drawn = np.asarray(picture(height, width, seed=seed))
    data = simplejpeg.encode_jpeg(drawn, quality=30 + seed % 70, colorsubsampling=sampling)
    known = turbo.header(data)
    h, w = int(rng.integers(1, height + 1)), int(rng.integers(collate._NARROWEST, width + 1))
    box = (int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
    side, flips = int(rng.choice([1, 8, 37, 64, 224])), int(rng.integers(0, 4))
    out = torch.full((side, side, 3), 99, dtype=torch.uint8).permute(2, 0, 1)
    done = made([(data, box, flips, out.data_ptr())], side, np.empty(made.room(known, box, side), np.uint8))
    whole = torch.from_numpy(turbo.decode(data, known)).permute(2, 0, 1)
    expected = transforms.scaled(whole[:, box[0] : box[0] + h, box[1] : box[1] + w], side, side)
    expected = expected.flip(-1) if flips & 1 else expected
    expected = expected.flip(-2) if flips & 2 else expected
    assert done[0]
    assert torch.equal(out, expected), (seed, height, width, sampling, box, side, flips)


@needs_native
def test_every_pixel_is_that_of_the_whole_picture_decoded_and_resized():
    for seed in range(150):
        compare(crops.load(), seed)


@pytest.mark.skipif(build.missing() != "", reason="no compiler, or no headers of libjpeg-turbo")
def test_the_same_without_vector_instructions(tmp_path):
    made = tmp_path / "plain.so"
    build.compile_native(made, "-O1", "-DPLAIN")
    for seed in range(40):
        compare(crops.Crops(native.opened(made)), seed, most=120)


@needs_native
@pytest.mark.parametrize(
    "augment",
    [
        {"resized_crop": (0.1, 1.0), "hflip": 0.5, "vflip": 0.5},
        {"resized_crop": (0.1, 1.0), "hflip": 0.5, "rotate_deg": 10, "brightness": 0.2, "erase": 0.5},
        {"hflip": 0.5, "rot90": True},
        {},
    ],
)
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_a_batch_is_the_same_without_native_code(anew, augment, resize):
    how = dataclasses.replace(pixels(**augment), resize=resize)
    some = rows(kinds=("JPEG", "PNG", "JPEG"))
    some[3] = some[3]._replace(image=encoded(picture(40, 40).convert("L"), "JPEG"))  # grey
    by_c = batch(how, some)[0]["image"]
    anew.setenv(native.SWITCH, "0")
    crops.load.cache_clear()
    assert crops.load() is None and native.SWITCH in crops.state()
    assert torch.equal(by_c, batch(how, some)[0]["image"])


@needs_native
def test_damaged_bytes_are_told_and_never_more():
    how, some = pixels(resized_crop=(0.1, 1.0)), rows(kinds=("JPEG",))
    good = batch(how, some)[0]["image"]
    cut = [*some[:5], some[5]._replace(image=some[5].image[:200]), *some[6:]]
    with pytest.raises(IntegrityError, match=r"row 5: .*readable at ingest"):
        batch(how, cut)
    rng = np.random.default_rng(0)
    for seed in range(200):  # whatever is in the bytes: pixels, or left alone
        data = bytearray(some[seed % 12].image)
        for at in rng.integers(2, len(data), 4):
            data[at] = int(rng.integers(0, 256))
        known = turbo.header(bytes(data))
        if known is None or known.channels != 3 or known.height * known.width > 1 << 20:
            continue
        box = (0, 0, known.height, known.width)
        out = torch.empty((24, 24, 3), dtype=torch.uint8).permute(2, 0, 1)
        memory = np.empty(crops.load().room(known, box, 24), np.uint8)
        crops.load()([(bytes(data), box, 0, out.data_ptr())], 24, memory)
    assert torch.equal(batch(how, some)[0]["image"], good)


@needs_native
def test_no_more_than_the_given_memory_is_written():
    data = encoded(picture(200, 300), "JPEG")
    box = (0, 0, 200, 300)
    out = torch.zeros((64, 64, 3), dtype=torch.uint8).permute(2, 0, 1)
    assert not crops.load()([(data, box, 0, out.data_ptr())], 64, np.empty(1000, np.uint8))[0]
    beyond = (100, 100, 150, 150)
    assert not crops.load()([(data, beyond, 0, out.data_ptr())], 64, np.empty(1 << 20, np.uint8))[0]
    assert not out.any()


def test_without_a_compiler_other_libraries_do_it(anew, tmp_path):
    anew.setenv("XDG_CACHE_HOME", str(tmp_path))
    anew.setenv("CC", "no-such-compiler")
    assert crops.load() is None
    assert "libjpeg-dev" in crops.state()
    how = pixels(resized_crop=(0.1, 1.0))
    with ThreadPoolExecutor(1) as pool:
        row = Row("1", "1.jpg", "here", encoded(picture(40, 40), "JPEG"), None, None, "a")
        assert collate.fill([row], how, (0, 0), pool, 1).wait()[0]["image"].shape == (1, 3, 24, 24)


@needs_native
def test_it_is_compiled_once_into_a_folder_of_the_user(anew, tmp_path):
    anew.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert crops.load() is not None
    (made,) = (cache.user_folder() / "native").iterdir()
    assert made.name.startswith("jpeg-") and made.parent.stat().st_mode & 0o077 == 0
    crops.load.cache_clear()
    anew.setenv("CC", "no-such-compiler")
    assert crops.load() is not None
    made.chmod(0o666)
    crops.load.cache_clear()
    assert crops.load() is None, "others may have written it"
