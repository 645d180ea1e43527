"""Small images made by code."""

import io
from pathlib import Path

import numpy as np
import PIL.Image


def png(seed: int, size_px: tuple[int, int] = (12, 10), mode: str = "RGB") -> bytes:
    """A PNG of noise; size is width and height."""
    bands = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size_px[1], size_px[0], bands), dtype=np.uint8)
    return encoded(PIL.Image.fromarray(pixels if bands > 1 else pixels[..., 0]), "PNG")


def encoded(picture: PIL.Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def write(root: Path, name: str, data: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


def class_folders(root: Path, classes: int = 3, each: int = 12, first: int = 0) -> Path:
    """CLASS/NUMBER.png, all different."""
    for label in range(classes):
        for i in range(first, first + each):
            write(root, f"class{label}/{i:04d}.png", png(1000 * label + i))
    return root
