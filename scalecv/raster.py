"""The one door to rasterio: GeoTIFF bytes to pixels, any number of bands, any dtype.

Bytes come in and nothing else is touched: only the GTiff driver is registered to open them, no
sidecar files are looked for, and GDAL's network drivers are off.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# No listing beside the file, no .aux.xml, no PROJ grids from the net, one thread, failures at once.
_ENV = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_HTTP_MAX_RETRY": "0",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    "PROJ_NETWORK": "OFF",
    "GDAL_NUM_THREADS": "1",
    "GTIFF_IGNORE_READ_ERRORS": "NO",
}


class RasterError(ValueError):
    """GDAL cannot read these bytes as a GeoTIFF; the message is GDAL's."""


@dataclass(frozen=True)
class Profile:
    """What the header of a GeoTIFF says."""

    width: int
    height: int
    bands: int
    dtype: str
    nodata: float | None
    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    """Affine from pixel to map: a b c d e f, x = a·col + b·row + c."""


def profile(data: bytes) -> Profile:
    """What the header says; no pixel is read.

    Raises: RasterError: not a GeoTIFF, or its header is damaged.
    """
    with _open(data) as source:
        return _profile(source)


def read(data: bytes) -> tuple[NDArray[Any], float | None]:
    """All pixels as [H, W, C] in the file's dtype, and the nodata value if there is one.

    Raises: RasterError: not a GeoTIFF, damaged, or cut.
    """
    with _open(data) as source:
        return np.moveaxis(source.read(), 0, -1), _profile(source).nodata


def _profile(source: Any) -> Profile:
    dtypes = set(source.dtypes)
    if len(dtypes) != 1:
        raise RasterError(f"bands of different dtypes: {', '.join(sorted(dtypes))}")
    nodata = source.nodata
    return Profile(
        source.width,
        source.height,
        source.count,
        source.dtypes[0],
        None if nodata is None else float(nodata),
        source.crs.to_string() if source.crs else None,
        tuple(source.transform)[:6],
    )


@contextlib.contextmanager
def _open(data: bytes) -> Iterator[Any]:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError
    from rasterio.io import MemoryFile

    # Not warnings.catch_warnings: it is not safe in the threads that decode.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    try:
        with rasterio.Env(**_ENV), MemoryFile(data) as file, file.open(driver="GTiff", sharing=False) as source:
            yield source
    except (RasterioError, ValueError, TypeError) as error:
        if isinstance(error, RasterError):
            raise
        raise RasterError(str(error.__cause__ or error).strip() or type(error).__name__) from None
