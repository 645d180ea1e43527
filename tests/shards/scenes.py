"""Large rasters made by code: smooth noise with bright squares, a mask, and a corner without data."""

from pathlib import Path

import numpy as np

from scalecv import raster
from tests.shards.images import write


def scene(seed: int, width: int, height: int, bands: int = 4, dtype: str = "uint16") -> tuple[np.ndarray, np.ndarray]:
    """Pixels [H, W, C] and mask [H, W] of 0 and 1."""
    rng = np.random.default_rng(seed)
    image = rng.integers(100, 3000, (height, width, bands)).astype(dtype)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(max(1, width * height // 20_000)):
        top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
        mask[top : top + 40, left : left + 40] = 1
    image[mask == 1] += np.array(5000).astype(dtype)
    return image, mask


def place(col: float, row: float, pixel_m: float = 10.0) -> tuple[float, ...]:
    """The transform of a scene whose upper left corner lies `col`, `row` pixels from a corner of the zone."""
    return (pixel_m, 0.0, 500_000 + col * pixel_m, 0.0, -pixel_m, 5_400_000 - row * pixel_m)


def wkt(code: int = 32632) -> str:
    from rasterio.crs import CRS

    return CRS.from_epsg(code).to_wkt()


def two_scenes(root: Path, width: int = 600, height: int = 500, apart_px: int = 2000, **more) -> Path:
    """images/a.tif, images/c.tif and their masks; c lies `apart_px` east of a; 200 columns of a have no data."""
    for number, name in enumerate("ac"):
        image, mask = scene(number, width, height, **more)
        if name == "a":
            image[:, :200] = 0
        transform = place(number * apart_px, 0)
        write(
            root,
            f"images/{name}.tif",
            raster.encode(image, 0, wkt(), transform, ("red", "green", "blue", "nir")[: image.shape[2]]),
        )
        write(root, f"masks/{name}.tif", raster.encode(mask[:, :, None], None, wkt(), transform))
    return root
