import warnings

import numpy as np
import pytest
import rasterio

from scalecv import raster


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
