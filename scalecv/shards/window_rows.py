"""Windows of scenes as rows: pixels of a row of windows are decoded at once, each window is encoded and examined.

Every window becomes a small GeoTIFF of its own, without loss, with the georeference of its place. All have one side:
a scene that is smaller is filled up with a value that means no data.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalecv import raster, storage
from scalecv.raster import PIXELS, Profile
from scalecv.shards.decode import BadImage
from scalecv.shards.examine import Facts, Note, Place, examine, mask_place
from scalecv.shards.footprints import SCENE, place_of
from scalecv.shards.plan import UnitSettings
from scalecv.shards.record import Record
from scalecv.shards.scene import SceneReader
from scalecv.tiles import Window

AT_ONCE_BYTES = 128 << 20
"""Decoded pixels that are held at once."""

Readers = tuple[SceneReader, SceneReader]
"""Of the image, and of its mask."""
_Sample = tuple[dict[str, Any], bytes, bytes | None, str, Facts | BadImage]


def encoded(
    settings: UnitSettings, rows: Sequence[dict[str, Any]], record: Record, readers: Readers
) -> Iterator[_Sample]:
    """For each window: its row, the encoded image and mask, their SHA-256, and facts or why it is set aside.

    They come in random order, so that any stretch of the shard is a random sample of its scenes.

    Args:
        settings: of the unit.
        rows: windows, those of one scene together.
        record: counts windows that are left out because they hold no valid pixel.
        readers: children that decode.
    """
    found: list[_Sample] = []
    for scene, some in groupby(rows, key=lambda row: str(row["meta"]["scene"])):
        for sample in _scene(settings, scene, list(some), readers):
            facts = sample[4]
            if settings.drop_empty and not isinstance(facts, BadImage) and _is_empty(facts, settings.mask_ignore):
                record.dropped += 1
            else:
                found.append(sample)
    yield from sorted(found, key=lambda sample: hashlib.sha256(sample[0]["path"].encode()).digest())


def _is_empty(facts: Facts, ignore: int | None) -> bool:
    """Whether no pixel counts: in the image, or, where there is a mask, in both."""
    return not facts["pixels"] or (bool(facts["mask_values"]) and set(facts["mask_values"]) == {str(ignore)})


def _scene(settings: UnitSettings, scene: str, rows: list[dict[str, Any]], readers: Readers) -> Iterator[_Sample]:
    image, mask = readers
    notes: dict[Note, str] = {}
    try:
        profile = image.open(storage.join(settings.source, scene), _bytes(settings, scene))
        if rows[0]["mask"]:
            path = rows[0]["mask"]
            numbers = mask.open(storage.join(settings.source, path), _bytes(settings, path), is_mask=True)
            notes = mask_place(profile, numbers)
    except BadImage as error:
        yield from ((row, b"", None, "", error) for row in rows)
        return
    for sample in _samples(settings, profile, rows, readers):
        if not isinstance(sample[4], BadImage):
            sample[4]["notes"].update(notes)
        yield sample


def _samples(
    settings: UnitSettings, profile: Profile, rows: list[dict[str, Any]], readers: Readers
) -> Iterator[_Sample]:
    for some in _strips(rows, profile):
        try:
            yield from _cut(settings, profile, some, readers)
        except BadImage as error:
            if len(some) == 1:
                yield some[0], b"", None, "", error
                continue
            for row in some:  # one block is damaged: find out whose
                try:
                    yield from _cut(settings, profile, [row], readers)
                except BadImage as its_own:
                    yield row, b"", None, "", its_own


def _bytes(settings: UnitSettings, path: str) -> int:
    """Size of a scene.

    Raises: BadImage: it is gone.
    """
    entry = storage.head(storage.join(settings.source, path))
    if entry is None:
        raise BadImage("missing", "gone since it was listed")
    return entry.size_bytes


def _strips(rows: list[dict[str, Any]], profile: Profile) -> Iterator[list[dict[str, Any]]]:
    """Windows side by side that are decoded together."""
    most = AT_ONCE_BYTES // (profile.bands * np.dtype(profile.dtype).itemsize)
    held: list[dict[str, Any]] = []
    area: Window | None = None
    for row in rows:
        window = _window(row)
        both = window if area is None else area.around(window)
        if area is not None and (window.row != area.row or window.height != area.height or both.pixels > most):
            yield held
            held, both = [], window
        held.append(row)
        area = both
    if held:
        yield held


def _window(row: Mapping[str, Any]) -> Window:
    return Window.parse(row["meta"]["window"])


def _cut(settings: UnitSettings, profile: Profile, rows: list[dict[str, Any]], readers: Readers) -> list[_Sample]:
    """Raises: BadImage: something in the area of these windows cannot be decoded."""
    area = _window(rows[0])
    for row in rows[1:]:
        area = area.around(_window(row))
    pixels = readers[0].read(area)
    numbers = readers[1].read(area) if rows[0]["mask"] else None
    return [_sample(settings, profile, row, area, pixels, numbers) for row in rows]


def _sample(
    settings: UnitSettings,
    profile: Profile,
    row: dict[str, Any],
    area: Window,
    pixels: NDArray[Any],
    numbers: NDArray[Any] | None,
) -> _Sample:
    window, side = _window(row), settings.tile_px or 0
    down = slice(window.row - area.row, window.row - area.row + window.height)
    across = slice(window.col - area.col, window.col - area.col + window.width)
    part, nodata = _filled(pixels[down, across], side, profile.nodata)
    place = raster.shifted(profile.transform, window.col, window.row) if profile.transform != PIXELS else PIXELS
    data = raster.encode(part, nodata, profile.wkt, place, profile.names)
    mask, values = None, None
    if numbers is not None:
        # What is filled up counts nowhere; it repeats the edge, so that no new value appears.
        values = np.pad(numbers[down, across], [(0, side - window.height), (0, side - window.width)], mode="edge")
        mask = raster.encode(values[:, :, None], None, profile.wkt, place)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        facts = examine(row["path"], data, mask, settings.mask_values, settings.mask_ignore)
    except BadImage as error:
        return row, data, mask, sha256, error
    facts["notes"].pop("name", None)
    if profile.nodata is None:  # what was filled up has a value that a band may hold
        facts["notes"].pop("nodata_some", None)
    facts["place"] = _footprint(profile, row["meta"]["scene"], window)
    return row | {"content": _content(part, nodata)}, data, mask, sha256, facts


def _footprint(profile: Profile, scene: str, window: Window) -> Place:
    """As `Facts` tells it, without what was filled up."""
    known = place_of(profile) or (SCENE + scene, PIXELS)
    return (known[0], *raster.shifted(known[1], window.col, window.row), window.width, window.height)


def _content(pixels: NDArray[Any], nodata: float | None) -> str:
    """SHA-256 of pixels: the same whatever library compresses them."""
    head = f"{pixels.dtype.newbyteorder('<').str} {pixels.shape} {nodata}"
    little = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("<"), copy=False))
    return hashlib.sha256(head.encode() + little.tobytes()).hexdigest()


def _filled(pixels: NDArray[Any], side: int, nodata: float | None) -> tuple[NDArray[Any], float | None]:
    """[side, side, C], filled up at the right and below, and the value of what was filled.

    Raises: BadImage: no value is left that could mean no data.
    """
    height, width, _ = pixels.shape
    if height == side and width == side:
        return pixels, nodata
    value = _unused(pixels) if nodata is None else nodata
    out = np.full((side, side, pixels.shape[2]), value, pixels.dtype)
    out[:height, :width] = pixels
    return out, float(value)


def _unused(pixels: NDArray[Any]) -> float:
    """A value that no pixel has in all of its bands.

    Raises: BadImage: there is none.
    """
    if pixels.dtype.kind == "f":
        return math.nan
    limits = np.iinfo(pixels.dtype)
    candidates = chain((limits.min, limits.max), range(limits.min + 1, limits.max))
    value = next((value for value in candidates if not (pixels == value).all(-1).any()), None)
    if value is None:
        height, width, _ = pixels.shape
        raise BadImage(
            "unsupported",
            f"{width}x{height} px are less than a tile, and all values of {pixels.dtype} occur, so none can mean no "
            f"data where it is filled up: ingest it with --tile {min(height, width)} or less, or declare nodata",
        )
    return float(value)
