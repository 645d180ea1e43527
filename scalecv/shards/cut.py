"""From scenes to windows, while a source is listed: headers are read, no pixel is; and what a split keeps together.

Found (a scene) ── header ──▶ where it lies ──▶ groups (scenes that lie on each other, or blocks) ──▶ Found (windows)
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from queue import SimpleQueue

import numpy as np

from scalecv import storage
from scalecv.errors import ConfigError
from scalecv.raster import Profile
from scalecv.shards import footprints
from scalecv.shards.decode import BadImage
from scalecv.shards.footprints import SCENE, Footprints
from scalecv.shards.manifest import Tiling
from scalecv.shards.options import IngestOptions
from scalecv.shards.scene import SceneReader
from scalecv.sources.found import Found, LeftOut
from scalecv.tiles import Window, grid

META = ("scene", "window")
"""Metadata columns of a row that is a window: path of the scene, and column,row,width,height in its pixels."""
_READERS = 8


@dataclass(frozen=True)
class _Scene:
    found: Found
    profile: Profile | None
    """None where nothing was read, for a reason that `found` names."""


def tiling(options: IngestOptions) -> Tiling | None:
    """How scenes are cut, if they are."""
    return Tiling(size_px=options.tile, overlap_px=options.overlap) if options.tile else None


def check(options: IngestOptions) -> None:
    """Raises: ConfigError: options that do not go together."""
    if options.tile is None:
        for name in ("overlap", "drop_empty", "block"):
            if getattr(options, name):
                raise ConfigError(f"--{name.replace('_', '-')} goes with --tile, the side of the windows in pixels")
        if options.split_by == "block":
            raise ConfigError("--split-by block goes with --tile; images as they are: --split-by scene")
    elif options.overlap >= options.tile:
        raise ConfigError(f"--overlap {options.overlap}: expected less than --tile {options.tile}")
    if options.split_by == "block":
        if options.group is not None:
            raise ConfigError("--group and --split-by block both say what a split keeps together: name one of them")
        if options.block is None:
            raise ConfigError("--split-by block needs --block, its side: pixels as 4096, or map units as 2000map")
        side, is_map = _block(options.block)
        if not is_map and side < (options.tile or 0):
            raise ConfigError(f"--block {options.block}: expected at least one tile, --tile {options.tile}")
    elif options.block is not None:
        raise ConfigError("--block goes with --split-by block")


def cut(found: Iterable[Found | LeftOut], options: IngestOptions, source: str) -> Iterator[Found | LeftOut]:
    """The windows of the scenes of a source, each with the group that a split keeps together.

    A scene that cannot be read stays one row, with the reason as its problem. Without --tile rows stay whole, and
    --split-by scene groups those that lie on each other.

    Raises: ConfigError: options that do not go together.
    """
    check(options)
    if options.tile is None and options.split_by is None:
        yield from found
        return
    scenes: list[_Scene] = []
    for item in _read(found, source):
        if isinstance(item, LeftOut):
            yield item
        else:
            scenes.append(item)
    if options.split_by != "block":
        scenes = _grouped(scenes)
    for scene in scenes:
        if scene.profile is None or options.tile is None:
            yield scene.found
        else:
            yield from _windows(scene.found, scene.profile, options)


def _read(found: Iterable[Found | LeftOut], source: str) -> Iterator[_Scene | LeftOut]:
    """Headers of scenes and masks; several at a time, each by a reader that is free."""
    free: SimpleQueue[SceneReader] = SimpleQueue()
    readers = [SceneReader() for _ in range(1 if storage.is_local(source) else _READERS)]
    for reader in readers:
        free.put(reader)

    def read(item: Found | LeftOut) -> _Scene | LeftOut:
        if isinstance(item, LeftOut):
            return item
        reader = free.get()
        try:
            return _header(item, source, reader)
        finally:
            free.put(reader)

    items = iter(found)
    try:
        with ThreadPoolExecutor(len(readers)) as pool:
            while some := list(islice(items, 64)):
                yield from pool.map(read, some)
    finally:
        for reader in readers:
            reader.close()


def _header(found: Found, source: str, reader: SceneReader) -> _Scene:
    if found.problem:
        return _Scene(found, None)
    try:
        profile = reader.open(storage.join(source, found.path), found.size_bytes)
    except BadImage as error:
        return _Scene(replace(found, problem=f"{error.reason}: {error.detail}"), None)
    if found.mask:
        try:
            mask = reader.open(storage.join(source, found.mask), found.mask_size_bytes, is_mask=True)
        except BadImage as error:
            return _Scene(replace(found, problem=f"mask_damaged: {found.mask}: {error.detail}"), None)
        if (mask.width, mask.height) != (profile.width, profile.height):
            sizes = f"mask of {mask.width}x{mask.height} px for a scene of {profile.width}x{profile.height} px"
            return _Scene(replace(found, problem=f"mask_size: {sizes}"), None)
    return _Scene(found, profile)


def _grouped(scenes: list[_Scene]) -> list[_Scene]:
    """Scenes with one group for all that lie on each other or have a group of the user's in common."""
    known = [scene for scene in scenes if scene.profile is not None and footprints.place_of(scene.profile)]
    together = {scene.found.path: scene.found.group or scene.found.path for scene in scenes}
    if known:
        found = Footprints(
            [scene.found.path for scene in known],
            [place[0] for scene in known if scene.profile and (place := footprints.place_of(scene.profile))],
            np.array([_corners(scene.profile) for scene in known if scene.profile]),
            np.arange(len(known)),
        )
        first = footprints.components(found)
        above: dict[str, str] = {}

        def top(name: str) -> str:
            while above.get(name, name) != name:
                name = above[name]
            return name

        for scene, number in zip(known, first, strict=True):
            a, b = top(together[scene.found.path]), top(together[known[number].found.path])
            above[max(a, b)] = min(a, b)
        together = {path: top(group) for path, group in together.items()}
    return [replace(scene, found=replace(scene.found, group=together[scene.found.path])) for scene in scenes]


def _corners(profile: Profile) -> list[tuple[float, float]]:
    return footprints.corners(profile.transform, profile.width, profile.height)


def _windows(found: Found, profile: Profile, options: IngestOptions) -> Iterator[Found]:
    size, overlap = options.tile or 0, options.overlap
    if set(META) & set(found.meta):
        raise ConfigError(f"{found.path}: the table has a column {' or '.join(META)}, which --tile makes: rename it")
    whole = Window(0, 0, profile.height, profile.width)
    areas = _blocks(found.path, profile, options) if options.split_by == "block" else [(found.group, whole)]
    pixel_bytes = profile.bands * np.dtype(profile.dtype).itemsize
    for group, area in areas:
        for window in grid(area.width, area.height, size, overlap, area.col, area.row):
            yield replace(
                found,
                path=f"{found.path}#{window}",
                size_bytes=max(1, window.pixels * pixel_bytes // 2),  # about what it takes in a shard
                mask_size_bytes=window.pixels // 8 if found.mask else 0,
                group=group,
                meta={**found.meta, "scene": found.path, "window": str(window)},
                key=_key(found.path, window),
            )


def _key(path: str, window: Window) -> bytes:
    """Scenes in random order, and within one from the top to the bottom, for blocks are decoded in rows."""
    return hashlib.sha256(path.encode()).digest()[:6] + window.row.to_bytes(4) + window.col.to_bytes(4)


def _block(text: str) -> tuple[float, bool]:
    """Side of a block, and whether it is in units of the map.

    Raises: ConfigError: no number above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(map)?", text)
    if not match or not float(match[1]) > 0 or (not match[2] and "." in match[1]):
        raise ConfigError(f"--block {text}: expected pixels, as 4096, or units of the map, as 2000map")
    return float(match[1]), match[2] is not None


def _blocks(path: str, profile: Profile, options: IngestOptions) -> Iterator[tuple[str, Window]]:
    """Groups and their areas: squares of a grid on the ground, or of a scene's pixels where it does not lie north up.

    Raises: ConfigError: map units for a scene without them, or blocks that are smaller than a tile.
    """
    text, tile = options.block, options.tile or 0
    side, is_map = _block(str(text))
    a, b, c, d, e, f = profile.transform
    is_ground = profile.is_placed and not b and not d
    if is_map and not is_ground:
        raise ConfigError(f"--block {text}: {path} has no georeference, or is turned: give the side in pixels")
    pixel = max(abs(a), abs(e))
    if is_map and side < tile * pixel * (1 - 1e-6):
        raise ConfigError(
            f"--block {text}: pixels of {path} have {pixel:g} units of the map, so blocks have {side / pixel:.3g} px; "
            f"expected at least one tile, --tile {tile}: give {math.ceil(tile * pixel)}map or more"
        )
    place = str(profile.crs) if is_ground else SCENE + path
    across, down = (side, side) if is_map or not is_ground else (side * abs(a), side * abs(e))
    columns = list(_spans(profile.width, c if is_ground else 0.0, a if is_ground else 1.0, across))
    for j, row, height in _spans(profile.height, f if is_ground else 0.0, e if is_ground else 1.0, down):
        for i, col, width in columns:
            yield f"block {place} {across:g} {i},{j}", Window(row, col, height, width)


def _spans(length: int, origin: float, step: float, side: float) -> Iterator[tuple[int, int, int]]:
    """Number, first pixel and length of the cells of a grid along an axis; pixels that a border cuts are in none."""
    ends = sorted((origin / side, (origin + length * step) / side))
    for number in range(math.floor(ends[0]), math.ceil(ends[1])):
        low, high = sorted(((number * side - origin) / step, ((number + 1) * side - origin) / step))
        first, last = max(0, math.ceil(low - 1e-6)), min(length, math.floor(high + 1e-6))
        if last > first:
            yield number, first, last - first
