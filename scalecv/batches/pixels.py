"""What pixels a run sees: bands, colour, size and normalisation, from the manifest's facts. No torch."""

from dataclasses import dataclass, field

import numpy as np

from scalecv.config import Augment, Data
from scalecv.errors import ConfigError, DataError
from scalecv.shards.manifest import Manifest

ONE_VALUE_STD = 1e12
"""Standard deviation that stands for that of a band with one value (an opaque alpha): the band becomes 0, and stays so
where another image has other values there, which the network has never seen."""


@dataclass(frozen=True)
class Pixels:
    """How an encoded row becomes pixels; part of every bundle, so that use sees what training saw."""

    bands: tuple[int, ...] | None
    """Bands to take, counted from 1; None takes all."""
    color: str
    """rgb, gray or native."""
    channels: int
    dtype: str
    """dtype of a batch: uint8, int16 or float32."""
    source_dtype: str
    """dtype of the files."""
    size_px: int | None
    resize: str
    mean: tuple[float, ...]
    """Per channel, in the units of the files."""
    std: tuple[float, ...]
    classes: tuple[str, ...]
    mask_values: tuple[int, ...] = ()
    mask_ignore: int | None = None
    span: tuple[float, ...] = ()
    """Largest less smallest value per channel over the training split; empty in bundles of older releases."""
    sides_px: tuple[int, int] | None = None
    """Shortest and longest side of the images that became squares of size_px, all splits; None without size_px, and in
    bundles of older releases."""
    augment: Augment = field(default_factory=Augment)
    marks_data: bool = False
    """Whether masks of a batch say where a tile has data (0, else IGNORE), and not what is there: for task=upscale."""


def pixels_of(manifest: Manifest, data: Data, where: str, task: str = "") -> Pixels:
    """What the manifest and the experiment say about pixels.

    Raises: DataError, ConfigError: images of several kinds or sizes and no key that makes them alike; bands
        that are not there.
    """
    kinds = sorted(manifest.band_counts)
    counts = {int(kind.partition("x")[2]) for kind in kinds}
    color = data.color
    if color == "auto":
        color = "native" if len(kinds) == 1 else "rgb" if all(k.startswith("uint8") for k in kinds) else "native"
    if color == "native" and len(kinds) > 1:
        found = ", ".join(f"{rows} {kind}" for kind, rows in manifest.band_counts.items())
        raise DataError(
            f"{where} holds images of several kinds ({found}): "
            "set data.color=rgb or gray for photographs, or ingest each kind into a dataset of its own"
        )
    if color != "native" and not all(kind.startswith(("uint8", "uint16")) for kind in kinds):
        raise ConfigError(
            f"data.color={color} is for photographs of 8 or 16 bits, {where} holds {', '.join(kinds)}: "
            "leave data.color out, and choose bands with data.bands"
        )
    smallest, largest = manifest.sizes_px[:2], manifest.sizes_px[2:]
    if data.size_px is None and smallest != largest:
        raise ConfigError(
            f"images of {where} have {smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]} pixels and a batch needs "
            "one size: set data.size_px, for example data.size_px=64"
        )
    if data.bands and color == "native" and max(data.bands) > max(counts):
        raise ConfigError(f"data.bands={list(data.bands)}: images of {where} have {max(counts)} bands, counted from 1")
    mean, std = _moments(manifest, color, where)
    if data.bands:
        if max(data.bands) > len(mean):
            raise ConfigError(f"data.bands={list(data.bands)}: with data.color={color} there are {len(mean)} bands")
        mean, std = mean[[b - 1 for b in data.bands]], std[[b - 1 for b in data.bands]]
    source_dtype = kinds[0].partition("x")[0] if len(kinds) == 1 else "uint8"
    return Pixels(
        bands=data.bands,
        color=color,
        channels=len(mean),
        dtype=source_dtype if source_dtype in ("uint8", "int16") else "float32",
        source_dtype=source_dtype,
        size_px=data.size_px,
        resize=data.resize,
        mean=tuple(mean.tolist()),
        std=tuple(np.where(std > 1e-6 * (1 + np.abs(mean)), std, ONE_VALUE_STD).tolist()),
        classes=manifest.classes,
        mask_values=manifest.mask_values,
        mask_ignore=manifest.mask_ignore,
        span=_span(manifest, color, data.bands),
        sides_px=_sides(manifest, data.resize) if data.size_px else None,
        augment=data.augment,
        marks_data=task == "upscale",
    )


def _sides(manifest: Manifest, how: str) -> tuple[int, int]:
    """Shortest and longest side of what is resized; a crop takes the square of the shorter side."""
    smallest, largest = manifest.sizes_px[:2], manifest.sizes_px[2:]
    return min(smallest), min(largest) if how == "crop" else max(largest)


def _span(manifest: Manifest, color: str, bands: tuple[int, ...] | None) -> tuple[float, ...]:
    """Range of the values per channel; that of 8 bits where photographs become rgb or gray."""
    if color != "native":
        span = (255.0,) * (1 if color == "gray" else 3)
    else:
        (stats,) = manifest.stats.values()
        span = tuple(high - low for low, high in zip(stats.min, stats.max, strict=True))
    return tuple(span[band - 1] for band in bands) if bands else span


def _moments(manifest: Manifest, color: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over the training split, in the units of the files."""
    total, first, second = 0, np.zeros(1), np.zeros(1)
    for kind, stats in manifest.stats.items():
        mean, std = np.array(stats.mean), np.array(stats.std)
        square = std**2 + mean**2
        if color != "native":
            take = [0, 0, 0] if len(mean) < 3 else [0, 1, 2]
            mean, square = mean[take], square[take]
            if color == "gray":
                # Luma weights of ITU-R BT.601; the spread of the luma is taken as that of its parts.
                luma = np.array([0.299, 0.587, 0.114])
                mean, square = (mean * luma).sum(keepdims=True), (square * luma).sum(keepdims=True)
            scale = 255 / 65535 if kind.startswith("uint16") else 1.0
            mean, square = mean * scale, square * scale**2
        total += stats.pixels
        first, second = first + mean * stats.pixels, second + square * stats.pixels
    if total == 0:
        raise DataError(
            f"{where} has no pixels to take statistics from: its train split is empty; ingest with a train split"
        )
    mean = first / total
    return mean, np.sqrt(np.maximum(second / total - mean**2, 0))
