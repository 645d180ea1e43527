import dataclasses
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import rasterio

from scalecv import raster
from scalecv.tiles import Window


def tiff(pixels_HWC: np.ndarray, **profile) -> bytes:
    height, width, bands = pixels_HWC.shape
    shape = {"width": width, "height": height, "count": bands, "dtype": pixels_HWC.dtype}
    with rasterio.MemoryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with file.open(driver="GTiff", **shape, **profile) as target:
            target.write(np.moveaxis(pixels_HWC, -1, 0))
        return bytes(file.read())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("bands", [1, 4, 13])
def test_any_dtype_and_number_of_bands_come_back(dtype, bands):
    pixels = (np.random.default_rng(0).random((9, 7, bands)) * 200).astype(dtype)
    read, nodata = raster.read(tiff(pixels))
    assert read.dtype == dtype and nodata is None
    np.testing.assert_array_equal(read, pixels)


def test_profile_tells_place_and_nodata_without_reading_pixels():
    data = tiff(
        np.zeros((4, 6, 2), np.int16), nodata=-9999, crs="EPSG:3826", transform=rasterio.Affine(2, 0, 5, 0, -2, 9)
    )
    found = raster.profile(data)
    assert (found.width, found.height, found.bands, found.dtype, found.nodata) == (6, 4, 2, "int16", -9999.0)
    assert found.crs == "EPSG:3826" and found.transform == (2, 0, 5, 0, -2, 9)


@pytest.mark.parametrize("data", [b"", b"II*\x00", b"plain text", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_bytes_that_are_no_geotiff_are_refused(data):
    with pytest.raises(raster.RasterError):
        raster.read(data)


def test_a_cut_file_is_refused():
    data = tiff(np.random.default_rng(0).integers(0, 255, (64, 64, 4), dtype=np.uint8))
    with pytest.raises(raster.RasterError):
        raster.read(data[: len(data) // 2])


def test_other_drivers_stay_shut(tmp_path):
    vrt = b'<VRTDataset rasterXSize="1" rasterYSize="1"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'
    with pytest.raises(raster.RasterError):
        raster.read(vrt)


@pytest.mark.parametrize("name", ["pvroof", "naip4", "water12", "pv4band"])
def test_a_tile_that_is_cut_and_encoded_is_the_same_pixels_in_the_same_place(shared_data, name):
    data = next(shared_data(name).glob("*/images/*")).read_bytes()
    whole, nodata = raster.read(data)
    with raster.open_scene(lambda: io.BytesIO(data)) as scene:
        found, window = scene.profile, Window(10, 7, 64, 50)
        pixels = scene.read(window)
    assert found == raster.profile(data)
    np.testing.assert_array_equal(pixels, whole[10:74, 7:57])
    place = raster.shifted(found.transform, window.col, window.row) if found.is_placed else found.transform
    tile = raster.encode(pixels, nodata, found.wkt, place, found.names)
    np.testing.assert_array_equal(raster.read(tile)[0], pixels)
    again = raster.profile(tile)
    assert (again.dtype, again.crs, again.transform, again.names) == (found.dtype, found.crs, place, found.names)
    # GDAL writes what Esri's software wrote (pv4band) in its own words: GRS 1980 with three digits less.
    assert again.wkt == found.wkt or name == "pv4band"


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_tiles_of_any_dtype_are_encoded_without_loss(dtype):
    pixels = ((np.random.default_rng(0).random((9, 7, 5)) - 0.5 * (dtype[0] != "u")) * 200).astype(dtype)
    np.testing.assert_array_equal(raster.read(raster.encode(pixels, nodata=0))[0], pixels)


def test_rows_that_are_written_become_a_cog_with_the_same_georeference(shared_data, tmp_path):
    found = raster.profile(next(shared_data("pvroof").glob("*/images/*")).read_bytes())
    values = np.random.default_rng(0).integers(0, 4, (1, 700, 600), dtype=np.uint8)
    place = (str(tmp_path / "a.tif"), (600, 700), 1, "uint8", 255, found.wkt, found.transform)
    with raster.create(*place, {"classes": "ground,roof"}) as write:
        for top in range(0, 700, 300):
            write(top, values[:, top : top + 300])
    raster.to_cog(str(tmp_path / "a.tif"), str(tmp_path / "b.tif"), is_classes=True)
    with rasterio.open(tmp_path / "b.tif") as cog:
        assert cog.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and cog.overviews(1) and cog.nodata == 255
        np.testing.assert_array_equal(cog.read(), values)
        assert cog.crs.to_wkt() == found.wkt and tuple(cog.transform)[:6] == found.transform
        assert cog.tags()["classes"] == "ground,roof"


def test_of_a_scene_only_what_is_needed_is_read_and_what_is_gone_is_named():
    pixels = np.random.default_rng(0).integers(0, 255, (1024, 256, 3), dtype=np.uint8)
    data = tiff(pixels, tiled=True, blockxsize=64, blockysize=64)

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            Counted.taken += size
            return super().read(size)

    with raster.open_scene(lambda: Counted(data)) as scene:
        np.testing.assert_array_equal(scene.read(Window(64, 0, 64, 256)), pixels[64:128])
    assert Counted.taken < len(data) // 8
    with raster.open_scene(lambda: io.BytesIO(data[: len(data) // 2])) as scene:
        scene.read(Window(0, 0, 64, 64))
        with pytest.raises(raster.RasterError):
            scene.read(Window(960, 0, 64, 64))


@pytest.mark.parametrize("name", ["pvroof", "naip4", "water12", "pv4band"])
def test_who_asks_for_pixels_alone_gets_all_but_the_place(shared_data, name):
    for path in sorted(shared_data(name).glob("*/*/*.tif"))[:6]:
        data = path.read_bytes()
        with raster.open_bytes(data, is_placed=False) as scene:
            bare, pixels = scene.profile, scene.read()
        with raster.open_bytes(data) as scene:
            assert bare == dataclasses.replace(scene.profile, crs=None, wkt=None, transform=raster.PIXELS)
            np.testing.assert_array_equal(pixels, scene.read())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc that tells of open files")
def test_pixels_of_a_tile_ask_no_database_of_coordinate_systems(tmp_path):
    """PROJ would look the CRS up for each tile of each epoch, which takes longer than all else."""
    file = tmp_path / "tile.tif"
    file.write_bytes(tiff(np.zeros((4, 6, 2), np.uint8), crs="EPSG:3826", transform=rasterio.Affine(2, 0, 5, 0, -2, 9)))
    script = (
        "import os, sys; from scalecv import raster; from scalecv.shards.decode import decode_mask, decode_pixels\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "def asked():\n"
        "    links = (f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd'))\n"
        "    return any('proj.db' in os.readlink(link) for link in links if os.path.exists(link))\n"
        "decode_pixels(data), decode_mask(data), raster.read(data)\n"
        "print(asked(), raster.profile(data).crs, asked())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "EPSG:3826", "True"]
