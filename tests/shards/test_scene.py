"""Scenes through a child process: the same pixels, few bytes, and damage that stays where it is."""

import numpy as np
import pytest

from scalecv import raster, storage
from scalecv.shards import scene
from scalecv.shards.decode import BadImage
from scalecv.shards.scene import SceneReader
from scalecv.tiles import Window
from tests.shards.images import png
from tests.test_raster import tiff


@pytest.fixture(scope="module")
def reader():
    child = SceneReader()
    yield child
    child.close()


def test_windows_of_all_kinds_of_files(reader, shared_data, tmp_path):
    files = [next(shared_data(name).glob("*/images/*")) for name in ("pvroof", "naip4", "water12", "pv4band")]
    for file in files:
        found = reader.open(str(file), file.stat().st_size)
        assert found == raster.profile(file.read_bytes())
        np.testing.assert_array_equal(reader.read(Window(3, 5, 70, 60)), raster.read(file.read_bytes())[0][3:73, 5:65])
    (tmp_path / "a.png").write_bytes(png(1, (40, 30)))
    found = reader.open(str(tmp_path / "a.png"), (tmp_path / "a.png").stat().st_size)
    assert (found.width, found.height, found.bands, found.dtype, found.crs) == (40, 30, 3, "uint8", None)
    assert reader.read(Window(1, 2, 5, 6)).shape == (5, 6, 3)


def test_a_damaged_block_is_named_and_the_others_are_read(reader, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (4096, 512, 3), dtype=np.uint8)
    data = tiff(pixels, tiled=True, blockxsize=256, blockysize=256, compress="deflate")
    (tmp_path / "a.tif").write_bytes(data[: len(data) * 2 // 3])
    reader.open(str(tmp_path / "a.tif"), len(data) * 2 // 3)
    with pytest.raises(BadImage, match="damaged"):
        reader.read(Window(3900, 0, 64, 64))
    np.testing.assert_array_equal(reader.read(Window(7, 9, 64, 64)), pixels[7:71, 9:73])
    taken = []
    monkeypatch.setattr(scene, "_CHUNK", 1 << 16)  # of this process; the child keeps its own
    monkeypatch.setattr(scene, "_range", lambda u, a, b: taken.append(b - a) or storage.get_range(u, a, b))
    (tmp_path / "b.tif").write_bytes(data)
    reader.open(str(tmp_path / "b.tif"), len(data))
    reader.read(Window(0, 0, 256, 256))
    assert sum(taken) <= 4 << 20 < len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"II*\0" + bytes(99), "damaged"), (b"text", "not_an_image"), (png(1)[:40], "truncated")],
)
def test_what_is_no_scene_has_a_reason(reader, tmp_path, data, reason):
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(BadImage) as caught:
        reader.open(str(tmp_path / "a.tif"), len(data))
    assert caught.value.reason == reason


def test_the_death_of_the_child_is_told_and_the_scene_goes_on(reader, tmp_path):
    data = tiff(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64, 1))
    (tmp_path / "a.tif").write_bytes(data)
    reader.open(str(tmp_path / "a.tif"), len(data))
    reader._child.process.kill()
    with pytest.raises(BadImage, match="decoder_died"):
        reader.read(Window(0, 0, 8, 8))
    assert reader.read(Window(0, 0, 8, 8))[7, 7, 0] == 7 * 64 + 7
    with pytest.raises(BadImage, match="unreadable"):
        reader.open(str(tmp_path / "gone.tif"), 100)
