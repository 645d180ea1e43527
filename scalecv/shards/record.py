"""What one unit of work saw, and how many such records add up to the facts of a dataset."""

import json
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, PrivateAttr

from scalecv.errors import IntegrityError
from scalecv.shards.decode import BadImage
from scalecv.shards.examine import Facts
from scalecv.shards.footprints import SCENE
from scalecv.shards.manifest import BandStats, Shard

K = TypeVar("K")
_HELD = 256
"""Rows that are counted at once."""


class Aside(BaseModel):
    """One sample that was set aside, or kept with a note."""

    path: str
    stage: str
    """list, read, decode or mask; note for one that was kept."""
    reason: str
    detail: str
    size_bytes: int
    sha256: str


class Footprint(BaseModel):
    """Where one row lies."""

    path: str
    place: str
    """CRS, or the path of the scene whose pixels these are."""
    transform: tuple[float, float, float, float, float, float]
    width: int
    height: int


class BandSums(BaseModel):
    """Sums of the images of one dtype and number of bands."""

    rows: int
    pixels: int
    mean: list[float]
    m2: list[float]
    """Sum of squared distances from the mean."""
    min: list[float]
    max: list[float]

    def plus(self, other: "BandSums") -> "BandSums":
        """Both together, by Chan's formula (Chan, Golub, LeVeque 1983, equation 2.1)."""
        rows, pixels = self.rows + other.rows, self.pixels + other.pixels
        if not self.pixels or not other.pixels:
            return (self if self.pixels else other).model_copy(update={"rows": rows})
        share = other.pixels / pixels
        gaps = [b - a for a, b in zip(self.mean, other.mean, strict=True)]
        weight = self.pixels * share
        return BandSums(
            rows=rows,
            pixels=pixels,
            mean=[a + gap * share for a, gap in zip(self.mean, gaps, strict=True)],
            m2=[a + b + gap * gap * weight for a, b, gap in zip(self.m2, other.m2, gaps, strict=True)],
            min=[min(a, b) for a, b in zip(self.min, other.min, strict=True)],
            max=[max(a, b) for a, b in zip(self.max, other.max, strict=True)],
        )

    def stats(self) -> BandStats:
        """As the manifest tells it."""
        std = tuple((m2 / max(1, self.pixels)) ** 0.5 for m2 in self.m2)
        return BandStats(
            rows=self.rows,
            pixels=self.pixels,
            mean=tuple(self.mean),
            std=std,
            min=tuple(self.min),
            max=tuple(self.max),
        )

    @staticmethod
    def of_images(images: Sequence[Facts]) -> "BandSums":
        """The sums of images with the same number of bands; rounded once, so the same on any machine."""
        seen = [image for image in images if image["pixels"]] or images[:1]
        counts = [image["pixels"] for image in seen]
        pixels = sum(counts)
        mean, m2 = [], []
        for means, m2s in zip(*(list(zip(*(i[k] for i in seen), strict=True)) for k in ("mean", "m2")), strict=True):
            middle = math.fsum(map(operator.mul, counts, means)) / max(1, pixels)
            mean.append(middle)
            m2.append(math.fsum([*m2s, *(n * (mu - middle) ** 2 for n, mu in zip(counts, means, strict=True))]))
        return BandSums(
            rows=len(images),
            pixels=pixels,
            mean=mean,
            m2=m2,
            min=[min(band) for band in zip(*(i["min"] for i in seen), strict=True)],
            max=[max(band) for band in zip(*(i["max"] for i in seen), strict=True)],
        )

    @staticmethod
    def of(stats: BandStats) -> "BandSums":
        """The sums behind a manifest's statistics."""
        m2 = [s * s * stats.pixels for s in stats.std]
        return BandSums(
            rows=stats.rows,
            pixels=stats.pixels,
            mean=list(stats.mean),
            m2=m2,
            min=list(stats.min),
            max=list(stats.max),
        )


class Record(BaseModel):
    """What one unit saw."""

    split: str
    rows: int = 0
    source_bytes: int = 0
    encoded_bytes: int = 0
    shard: Shard | None = None
    labels: dict[str, int] = {}
    mask_values: dict[str, int] = {}
    bands: dict[str, int] = {}
    rasters: dict[str, str] = {}
    """'uint8x4' -> one TIFF of that kind."""
    formats: dict[str, int] = {}
    sizes_px: list[int] | None = None
    sums: dict[str, BandSums] = {}
    footprints: list[Footprint] = []
    """Of the rows that say where they lie."""
    dropped: int = 0
    """Windows that were left out because no pixel of them counts."""
    row_labels: list[str] = []
    """Label of each row that has one, in the order of the shard."""
    row_masks: list[list[int]] = []
    """Of each row with a mask: value, pixels, value, pixels …"""
    row_contents: list[str] = []
    """Of each row what its image holds (see contents.py), 32 hex digits or none; in the order of the shard."""
    quarantine: list[Aside] = []
    notes: list[Aside] = []
    _held: list[tuple[Mapping[str, Any], Facts, str, int]] = PrivateAttr(default_factory=list)
    """Good rows that are not counted yet."""

    @staticmethod
    def start(split: str) -> "Record":
        """An empty record."""
        return Record(split=split)

    def see(self, size_bytes: int) -> None:
        """Count bytes that were read."""
        self.source_bytes += size_bytes

    def reject(self, row: Mapping[str, Any], bad: BadImage, sha256: str) -> None:
        """Set one row aside."""
        listed = bool(row["problem"])
        stage = "list" if listed else "read" if not sha256 else "mask" if "mask" in bad.reason else "decode"
        self.quarantine.append(_aside(row, stage, bad.reason, bad.detail, sha256))

    def accept(self, row: Mapping[str, Any], facts: Facts, sha256: str, encoded_bytes: int) -> None:
        """Count one good row."""
        held = self._held
        held.append((row, facts, sha256, encoded_bytes))
        if facts["notes"]:
            self.notes += [_aside(row, "note", note, detail, sha256) for note, detail in facts["notes"].items()]
        if len(held) >= _HELD:
            self._add_held()

    def encode(self) -> bytes:
        """As JSON."""
        self._add_held()
        return json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()

    def _add_held(self) -> None:
        """Add up the rows that were held, many at once: a model's fields are slow to set."""
        held, self._held = self._held, []
        kinds: dict[str, list[Facts]] = {}
        sizes = self.sizes_px
        for row, facts, sha256, _ in held:
            key = f"{facts['dtype']}x{facts['bands']}"
            kinds.setdefault(key, []).append(facts)
            _add(self.formats, facts["format"], 1)
            if row["label"] is not None:
                _add(self.labels, row["label"], 1)
                self.row_labels.append(row["label"])
            if row["mask"]:
                self.row_masks.append([n for pair in facts["mask_values"].items() for n in (int(pair[0]), pair[1])])
            for value, pixels in facts["mask_values"].items():
                _add(self.mask_values, value, pixels)
            if facts["place"]:
                place, *transform, width, height = facts["place"]
                told = {"place": place, "transform": tuple(transform), "width": width, "height": height}
                self.footprints.append(Footprint(path=row["path"], **told))
            self.row_contents.append(_content(facts, row.get("content", sha256)))
            if facts["format"] == "TIFF":
                self.rasters.setdefault(key, row["path"])
            sizes = _wider(sizes, [facts["width"], facts["height"]] * 2)
        self.sizes_px = sizes
        self.rows += len(held)
        self.encoded_bytes += sum(size for *_, size in held)
        for key, images in kinds.items():
            _add(self.bands, key, len(images))
            sums = BandSums.of_images(images)
            self.sums[key] = self.sums[key].plus(sums) if key in self.sums else sums

    @staticmethod
    def decode(data: bytes, where: str) -> "Record":
        """From JSON. Raises: IntegrityError: not a record."""
        try:
            return Record.model_validate_json(data)
        except ValueError:
            raise IntegrityError(f"{where} is not a unit's record: delete it, and run the same command again") from None


class Totals:
    """The sum of records, in the order in which they are added."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.splits: Counter[str] = Counter()
        self.labels: dict[str, Counter[str]] = {}
        self.mask_values: dict[str, Counter[int]] = {}
        self.bands: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.rasters: dict[str, str] = {}
        self.sizes_px: list[int] | None = None
        self.sums: dict[str, BandSums] = {}
        self.encoded_bytes = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.notes: Counter[str] = Counter()
        self.crs: Counter[str] = Counter()
        self.dropped = 0

    def add(self, record: Record) -> None:
        """Add one record."""
        if record.shard is not None:
            self.shards.append(record.shard)
        self.splits[record.split] += record.rows
        self.labels.setdefault(record.split, Counter()).update(record.labels)
        values = {int(v): n for v, n in record.mask_values.items()}
        self.mask_values.setdefault(record.split, Counter()).update(values)
        self.bands.update(record.bands)
        self.formats.update(record.formats)
        self.rasters = record.rasters | self.rasters
        if record.sizes_px is not None:
            self.sizes_px = _wider(self.sizes_px, record.sizes_px)
        if record.split == "train":
            for key, sums in record.sums.items():
                self.sums[key] = self.sums[key].plus(sums) if key in self.sums else sums
        self.encoded_bytes += record.encoded_bytes
        self.crs.update(f.place for f in record.footprints if not f.place.startswith(SCENE))
        self.dropped += record.dropped
        for aside in record.quarantine:
            self._example(aside)
            self.reasons[aside.reason] += 1
        for aside in record.notes:
            self._example(aside)
            self.notes[aside.reason] += 1

    def _example(self, aside: Aside) -> None:
        known = self.examples.setdefault(aside.reason, [])
        if len(known) < 3:
            known.append(aside.path)


def _aside(row: Mapping[str, Any], stage: str, reason: str, detail: str, sha256: str) -> Aside:
    return Aside(path=row["path"], stage=stage, reason=reason, detail=detail, size_bytes=row["size"], sha256=sha256)


def _content(facts: Facts, sha256: str) -> str:
    is_flat = not facts["pixels"] or facts["min"] == facts["max"]
    if is_flat and facts["format"] == "JPEG":  # of which only some rows were counted
        is_flat = "constant" in facts["notes"] or facts["width"] * facts["height"] == 1
    return "" if is_flat else sha256[:32]


def _add(counts: dict[str, int], key: str, count: int) -> None:
    counts[key] = counts.get(key, 0) + count


def _wider(a: list[int] | None, b: list[int]) -> list[int]:
    if a is None:
        return list(b)
    return [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
