"""Tiny data made by code: pictures of shapes in class folders, and 4-band GeoTIFF tiles with masks."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")


def shapes(folder: Path, count: int = 90, size_px: int = 16, seed: int = 0) -> Path:
    """`count` PNG files of noisy shapes, folder/CLASS/NUMBER.png."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        name = SHAPES[number % 3]
        picture = Image.new("RGB", (size_px, size_px), tuple(rng.integers(0, 60, 3).tolist()))
        draw = ImageDraw.Draw(picture)
        low, high = rng.integers(1, 4), size_px - rng.integers(2, 5)
        colour = tuple(rng.integers(150, 255, 3).tolist())
        if name == "circle":
            draw.ellipse((low, low, high, high), fill=colour)
        elif name == "square":
            draw.rectangle((low, low, high, high), fill=colour)
        else:
            draw.polygon([(low, high), (high, high), (size_px // 2, low)], fill=colour)
        noisy = np.clip(np.asarray(picture) + rng.normal(0, 8, (size_px, size_px, 3)), 0, 255).astype(np.uint8)
        file = folder / name / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(file)
    return folder


def fields(folder: Path, count: int = 24, size_px: int = 32, seed: int = 0) -> Path:
    """4-band uint16 GeoTIFF tiles with bright rectangles, train/images, train/masks, val/images, val/masks."""
    import rasterio
    from rasterio.transform import from_origin

    rng = np.random.default_rng(seed)
    for number in range(count):
        split = "val" if number % 4 == 3 else "train"
        image = rng.normal(3000, 200, (4, size_px, size_px))
        mask = np.zeros((size_px, size_px), np.uint8)
        if number % 6:
            top, left = rng.integers(2, size_px // 2, 2)
            mask[top : top + size_px // 3, left : left + size_px // 3] = 1
            image[3][mask == 1] += 4000
        for kind, data in (("images", image.astype(np.uint16)), ("masks", mask[None])):
            file = folder / split / kind / f"tile{number:03d}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            profile = {"driver": "GTiff", "width": size_px, "height": size_px, "count": len(data), "dtype": data.dtype}
            place = {"crs": "EPSG:32632", "transform": from_origin(500000 + number * size_px, 5400000, 1, 1)}
            with rasterio.open(file, "w", **profile, **place) as out:
                out.write(data)
    return folder
