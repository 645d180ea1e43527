"""JPEG files like photographs scaled to a short side of about 256 pixels, about 27 kB each, made from a seed."""

import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

BYTES = 27_000
"""Mean size of a file."""
DISTINCT = 600
"""Pictures that are drawn; the files are crops of them, mirrored and encoded anew, so that no two are alike."""
CLASSES = 10
QUALITY = 88
_HEIGHT, _WIDTH = 320, 432


def write_pictures(folder: Path, count: int, seed: int, threads: int) -> None:
    """`folder/train/CLASS/NUMBER.jpg` for the numbers below `count`; one of them is in `folder/val` too."""
    for name in range(CLASSES):
        (folder / "train" / f"class{name}").mkdir(parents=True, exist_ok=True)
    detail = _detail(seed)

    def write(first: int) -> None:
        picture = _picture(np.random.default_rng((seed, first)), detail)
        for number in range(first, count, DISTINCT):
            file = folder / "train" / f"class{number % CLASSES}" / f"{number:08d}.jpg"
            file.write_bytes(_encode(_part(picture, np.random.default_rng((seed, number, 1)))))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(min(DISTINCT, count))))
    shutil.copytree(folder / "train/class0", folder / "val/class0", ignore=lambda _, names: sorted(names)[1:])


def _picture(rng: np.random.Generator, detail: float) -> np.ndarray:
    """uint8 [320, 432, 3]: noise that falls with its frequency, some bright and dark discs, weak colours."""
    luma = _noise(rng, _HEIGHT, _WIDTH) * detail + 128
    rows, columns = np.ogrid[:_HEIGHT, :_WIDTH]
    for _ in range(6):
        y, x, radius = rng.uniform(0, _HEIGHT), rng.uniform(0, _WIDTH), rng.uniform(15, 90)
        luma[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] += rng.uniform(-50, 50)
    colours = [_noise(rng, _HEIGHT // 2, _WIDTH // 2).repeat(2, 0).repeat(2, 1) * detail * 0.4 + 128 for _ in range(2)]
    planes = [Image.fromarray(plane.clip(0, 255).astype(np.uint8)) for plane in (luma, *colours)]
    return np.asarray(Image.merge("YCbCr", planes).convert("RGB"))


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Unit variance, amplitude 1/frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    waves = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    noise = np.fft.irfft2(waves / frequency, (height, width))
    return noise / noise.std()


def _part(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A window with a short side of 248 to 264 pixels, lying or standing, mirrored or not."""
    short = int(rng.integers(248, 265))
    long = int(rng.integers(short, min(short * 3 // 2, _WIDTH) + 1))
    top, left = int(rng.integers(_HEIGHT - short + 1)), int(rng.integers(_WIDTH - long + 1))
    part = picture[top : top + short, left : left + long]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    return np.ascontiguousarray(part.transpose(1, 0, 2) if rng.random() < 0.25 else part)


def _encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _detail(seed: int) -> float:
    """The amplitude of noise at which files have BYTES on average."""
    low, high = 2.0, 120.0
    for _ in range(7):
        middle = (low + high) / 2
        sizes = []
        for number in range(6):
            rng = np.random.default_rng((seed, number))
            sizes.append(len(_encode(_part(_picture(rng, middle), rng))))
        low, high = (middle, high) if np.mean(sizes) < BYTES else (low, middle)
    return (low + high) / 2
