"""The one door to rasterio: GeoTIFF to pixels and back, any number of bands, any dtype, with its georeference.

Bytes come in and nothing else is touched: only the GTiff driver is registered to open them, no
sidecar files are looked for, and GDAL's network drivers are off.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from scalecv.tiles import Window

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


# Before threads begin: one that restores its warnings.catch_warnings takes away what was set meanwhile. Behind the
# user's own filters: who asked for this warning gets it until the first file is opened here.
warnings.filterwarnings("ignore", "Dataset has no geotransform", category=Warning, append=True)
_THREAD = threading.local()


def keep_settings() -> None:
    """Let this thread set GDAL up once, not for each file, which takes as long as opening one; for our own threads."""
    _THREAD.keeps = True


def _has_settings() -> bool:
    """Whether GDAL is set up in this thread, which happens here where the thread may keep it so."""
    if not getattr(_THREAD, "keeps", False):
        return False
    import rasterio
    from rasterio.env import getenv, hasenv

    if not (hasenv() and _ENV.items() <= getenv().items()):  # also after somebody else's Env was left
        rasterio.Env(**_ENV).__enter__()
    return True


class RasterError(ValueError):
    """GDAL cannot read these bytes as a GeoTIFF; the message is GDAL's."""


Transform = tuple[float, float, float, float, float, float]
"""Affine from pixel to map: a b c d e f, x = a·col + b·row + c, y = d·col + e·row + f."""
PIXELS: Transform = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""The transform of a file that has none."""


@dataclass(frozen=True)
class Profile:
    """What the header of a GeoTIFF says."""

    width: int
    height: int
    bands: int
    dtype: str
    nodata: float | None
    crs: str | None
    """Short where it has a name, as EPSG:3826."""
    transform: Transform
    wkt: str | None = None
    """The CRS as the file writes it."""
    block_px: tuple[int, int] = (0, 0)
    """Width and height of what is decoded at once."""
    names: tuple[str | None, ...] = ()
    """Of the bands, where the file names them."""

    @property
    def is_placed(self) -> bool:
        """Whether the file says where on the ground it lies."""
        return self.crs is not None and self.transform != PIXELS


def shifted(transform: Transform, col: float, row: float) -> Transform:
    """The transform of a window that begins at a column and row."""
    a, b, c, d, e, f = transform
    return (a, b, c + a * col + b * row, d, e, f + d * col + e * row)


def elsewhere(one: Profile, other: Profile) -> str:
    """How the ground of two files of one size differs, where both say where they lie; empty if it is the same."""
    from rasterio.crs import CRS

    if not (one.is_placed and other.is_placed):
        return ""
    if one.crs != other.crs and CRS.from_wkt(one.wkt) != CRS.from_wkt(other.wkt):
        return f"{other.crs}, not {one.crs}"[:200]
    a, b = (
        np.array([shifted(found.transform, *at) for at in ((0, 0), (one.width, 0), (0, one.height))])[:, [2, 5]]
        for found in (one, other)
    )
    away = float(np.hypot(*(b - a).T).max())
    pixel = float(np.hypot(one.transform[0], one.transform[3]))
    return f"up to {away:g} units of {one.crs} apart, at pixels of {pixel:g}" if away > pixel / 2 else ""


def profile(data: bytes) -> Profile:
    """What the header says; no pixel is read.

    Raises: RasterError: not a GeoTIFF, or its header is damaged.
    """
    with open_bytes(data) as scene:
        return scene.profile


def read(data: bytes) -> tuple[NDArray[Any], float | None]:
    """All pixels as [H, W, C] in the file's dtype, and the nodata value if there is one.

    Raises: RasterError: not a GeoTIFF, damaged, or cut.
    """
    with open_bytes(data, is_placed=False) as scene:
        return scene.read_interleaved(), scene.profile.nodata


@contextlib.contextmanager
def open_bytes(data: bytes, *, is_placed: bool = True) -> "Iterator[Scene]":
    """The GeoTIFF that some bytes are.

    Args:
        data: the file.
        is_placed: False leaves out where it lies. PROJ looks a CRS up in its database for each file that is opened,
            which takes 0.5 to 5 ms, and reading the pixels of 256x256 px takes less than one.

    Raises: RasterError: not a GeoTIFF, or its header is damaged.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.io import MemoryFile

    # Not warnings.catch_warnings: it is not safe in the threads that decode.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    sources = {} if is_placed else {"GEOREF_SOURCES": "NONE"}
    with contextlib.ExitStack() as stack:
        with _errors():
            if not _has_settings():
                stack.enter_context(rasterio.Env(**_ENV))
            file = stack.enter_context(MemoryFile(data))
            scene = Scene(stack.enter_context(file.open(driver="GTiff", sharing=False, **sources)))
        yield scene


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
        source.crs.to_wkt() if source.crs else None,
        source.block_shapes[0][::-1],
        tuple(source.descriptions),
    )


class Scene:
    """An open GeoTIFF that is read window by window; blocks that were decoded stay in GDAL's cache."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.profile = _profile(source)

    def read(self, window: Window | None = None) -> NDArray[Any]:
        """[h, w, C] of a window, or of all, in the file's dtype; in memory band by band, which sums over bands want.

        Raises: RasterError: a block is damaged, or lies outside of the file.
        """
        from rasterio.windows import Window as Area

        with _errors():
            area = Area(window.col, window.row, window.width, window.height) if window else None
            return np.moveaxis(self._source.read(window=area), 0, -1)

    def read_interleaved(self) -> NDArray[Any]:
        """[H, W, C] of all, in memory as well, which batches want; raises as `read`."""
        with _errors():
            found = self.profile
            pixels = np.empty((found.height, found.width, found.bands), found.dtype)
            self._source.read(out=np.moveaxis(pixels, -1, 0))  # GDAL interleaves bands faster than numpy
            return pixels


@contextlib.contextmanager
def open_scene(opened: Callable[[], BinaryIO]) -> Iterator[Scene]:
    """A GeoTIFF behind a file object, of which only what is asked for is read.

    Args:
        opened: gives a file object that reads and seeks.

    Raises: RasterError: not a GeoTIFF, or its header is damaged.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    def opener(path: str, mode: str = "rb") -> BinaryIO:
        if path.rpartition("/")[2] != _NAME:
            raise FileNotFoundError(path)  # nothing lies beside it
        return opened()

    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with contextlib.ExitStack() as stack:
        with _errors():
            stack.enter_context(rasterio.Env(**_ENV))
            source = stack.enter_context(rasterio.open(_NAME, driver="GTiff", sharing=False, opener=opener))
            scene = Scene(source)
        yield scene


_NAME = "scene.tif"


def encode(
    pixels_HWC: NDArray[Any],
    nodata: float | None = None,
    wkt: str | None = None,
    transform: Transform = PIXELS,
    names: tuple[str | None, ...] = (),
) -> bytes:
    """A small GeoTIFF, without loss: zstd with differences of neighbours, one block."""
    import rasterio

    height, width, bands = pixels_HWC.shape
    shape = {"width": width, "height": height, "count": bands, "dtype": pixels_HWC.dtype, "blockysize": height}
    # float16 knows no differences
    predictor = 1 if pixels_HWC.dtype.itemsize > 4 else 3 if pixels_HWC.dtype.kind == "f" else 2
    how = {"compress": "zstd", "zstd_level": 6, "predictor": predictor, "photometric": "minisblack"}
    with rasterio.Env(**_ENV), rasterio.MemoryFile() as file, _errors():
        with file.open(driver="GTiff", **shape, **how, **_place(nodata, wkt, transform)) as target:
            target.write(np.moveaxis(pixels_HWC, -1, 0))
            if any(names):
                target.descriptions = names
        return bytes(file.read())


@contextlib.contextmanager
def create(
    path: str,
    size_px: tuple[int, int],
    bands: int,
    dtype: str,
    nodata: float | None,
    wkt: str | None,
    transform: Transform,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Callable[[int, NDArray[Any]], None]]:
    """A GeoTIFF on local disk that is written by rows: a function of (first row, [C, rows, width])."""
    import rasterio
    from rasterio.windows import Window as Area

    width, height = size_px
    shape = {"width": width, "height": height, "count": bands, "dtype": dtype}
    how = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "zstd", "zstd_level": 1}
    with rasterio.Env(**_ENV), _errors():
        with rasterio.open(
            path, "w", driver="GTiff", bigtiff="if_safer", **shape, **how, **_place(nodata, wkt, transform)
        ) as target:
            target.update_tags(**(tags or {}))
            yield lambda row, rows: target.write(rows, window=Area(0, row, rows.shape[-1], rows.shape[-2]))


def to_cog(source: str, target: str, is_classes: bool) -> None:
    """A local GeoTIFF as a Cloud-Optimized one: blocks of 512 px, overviews, deflate.

    Args:
        source, target: paths.
        is_classes: whether the numbers are names; overviews then take one of them, else their mean.
    """
    import rasterio
    import rasterio.shutil

    resampling = "nearest" if is_classes else "average"
    how = {"compress": "deflate", "overview_resampling": resampling, "bigtiff": "if_safer"}
    with rasterio.Env(**_ENV), _errors():
        rasterio.shutil.copy(source, target, driver="COG", **how)


def to_lonlat(crs: str, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points of a CRS as longitude and latitude (WGS 84), degrees [N, 2]; NaN where it does not say, as outside of it.

    PROJ refuses points together: they are halved until those that it refuses stand alone, or in a 512th of all.
    """
    import rasterio
    from rasterio.warp import transform

    fewest = max(1, len(points_N2) // 512)

    def told(points: NDArray[np.float64]) -> NDArray[np.float64]:
        try:
            with _errors():
                found = np.stack(transform(crs, "EPSG:4326", points[:, 0], points[:, 1]), axis=1)
        except RasterError:
            if len(points) <= fewest:
                return np.full(points.shape, np.nan)
            half = len(points) // 2
            return np.concatenate([told(points[:half]), told(points[half:])])
        return np.where(np.isfinite(found).all(1, keepdims=True), found, np.nan)

    with rasterio.Env(**_ENV):
        return told(points_N2)


def _place(nodata: float | None, wkt: str | None, transform: Transform) -> dict[str, Any]:
    from rasterio import Affine
    from rasterio.crs import CRS
    from rasterio.errors import NotGeoreferencedWarning

    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    place: dict[str, Any] = {"nodata": nodata}
    if wkt is not None:
        place["crs"] = CRS.from_wkt(wkt)
    if transform != PIXELS:
        place["transform"] = Affine(*transform)
    return place


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What GDAL and rasterio raise, as one line of ours."""
    from rasterio._err import CPLE_BaseError  # what rasterio lets through as GDAL says it
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, CPLE_BaseError, ValueError, TypeError) as error:
        if isinstance(error, RasterError):
            raise
        raise RasterError(str(error.__cause__ or error).strip() or type(error).__name__) from None
