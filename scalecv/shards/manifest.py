"""The facts of one dataset version. Training starts from them alone: no listing, no footers."""

import hashlib
import json
from collections.abc import Sequence

from pydantic import Field

from scalecv.config import Frozen
from scalecv.errors import DataError, IntegrityError

FORMAT = 1


class Shard(Frozen):
    """One Parquet file."""

    path: str = Field(pattern=r"^split=(train|val|test)/[0-9a-f]{64}\.parquet$")
    """Below the dataset: split=NAME/SHA256.parquet."""
    split: str
    size_bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    footer_bytes: int
    """Length of the footer, magic and length word included: one ranged read fetches it."""
    byte_ranges: tuple[tuple[int, int], ...]
    """First byte and end (exclusive) of each row group in the file."""
    footer_sha256: str = ""
    """Of the footer; pages carry checksums of their own, Parquet's footer has none."""
    group_sha256: tuple[str, ...] = ()
    """Of the bytes of each row group; empty in manifests of older releases, whose pages alone are checked."""

    @property
    def rows(self) -> int:
        """Rows of all row groups."""
        return sum(self.row_groups)


class BandStats(Frozen):
    """Per-band sums over the training split, of the images that have this dtype and this many bands."""

    rows: int
    pixels: int
    """Pixels that count: finite and not nodata, of all bands alike."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]


class Quarantine(Frozen):
    """What was set aside (or noted), and why."""

    rows: int = 0
    reasons: dict[str, int] = {}
    """Reason -> rows."""
    path: str | None = Field(None, pattern=r"^_facts/[0-9a-f]{64}\.parquet$")
    """Parquet file below the dataset with uri, path, stage, reason, detail, size_bytes, sha256."""
    sha256: str | None = None


class Tiling(Frozen):
    """How scenes were cut into rows."""

    size_px: int
    overlap_px: int


class Overlap(Frozen):
    """Rows of two splits that lie on each other: what is learnt from one is asked in the other."""

    splits: tuple[str, str]
    pairs: int
    example: tuple[str, str]
    """Paths of one pair, in the order of `splits`."""


class Copies(Frozen):
    """Images of one split that another one holds too, byte for byte."""

    splits: tuple[str, str]
    images: int
    """Of the second split."""
    example: tuple[str, str]
    """Paths of an image and of its copy, in the order of `splits`."""


class RowFacts(Frozen):
    """The class, or the mask's pixel counts, of each row: what sampling needs."""

    path: str | None = Field(None, pattern=r"^_facts/[0-9a-f]{64}\.parquet$")
    """Parquet file below the dataset, rows in the order of the shards; None in manifests of older releases."""
    sha256: str | None = None
    has_contents: bool = False
    """Whether they say what images hold."""


class Manifest(Frozen):
    """The facts of one dataset version."""

    format: int = FORMAT
    layout: str
    source: str
    """Where the images came from, without credentials."""
    created_at: str
    """ISO 8601, UTC; not part of the fingerprint."""
    parent: str | None = None
    """Fingerprint of the version that this one was appended to."""
    fingerprint: str
    """SHA-256 of all that training can see; equal for the same images ingested anywhere."""
    kind: str
    """label, mask or image: what each row is labelled with."""
    classes: tuple[str, ...] = ()
    """Class names; the place in this list is the class number."""
    class_counts: dict[str, dict[str, int]] = {}
    """Split -> class -> rows (labels) or pixels (masks)."""
    mask_values: tuple[int, ...] = ()
    """Pixel value of each class (masks)."""
    mask_ignore: int | None = None
    """Pixel value of masks that counts nowhere."""
    splits: dict[str, int]
    """Split -> rows."""
    sizes_px: tuple[int, int, int, int]
    """Smallest width, smallest height, largest width, largest height."""
    formats: dict[str, int]
    """File format -> rows."""
    stats: dict[str, BandStats]
    """'uint8x3' (dtype and bands) -> statistics over the training split."""
    band_counts: dict[str, int]
    """'uint8x3' -> rows of all splits."""
    encoded_bytes: int
    """Encoded bytes of all images and masks."""
    meta: tuple[str, ...] = ()
    """Names of the metadata columns, without the prefix."""
    shards: tuple[Shard, ...]
    quarantine: Quarantine = Quarantine()
    notes: Quarantine = Quarantine()
    """Samples that were kept though something about them is odd; the same columns, stage note."""
    tiling: Tiling | None = None
    """Where rows are windows of scenes; the columns meta_scene and meta_window say which."""
    crs: dict[str, int] = {}
    """Coordinate system, by name or as WKT -> rows."""
    footprints: Quarantine = Quarantine()
    """Where the rows lie that say so: a Parquet file with path, split, place, transform, width, height."""
    overlaps: tuple[Overlap, ...] = ()
    """Splits whose rows lie on each other."""
    copies: tuple[Copies, ...] = ()
    """Splits that hold the same images."""
    row_facts: RowFacts = RowFacts()
    """Of single rows, where the release that ingested them kept any."""
    warnings: tuple[str, ...] = ()
    """What the ingest had to say about the dataset as a whole."""

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(self.splits.values())

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split, in the order of the manifest."""
        return tuple(s for s in self.shards if s.split == split)


def constant_bands(stats: BandStats, kind: str = "", used: Sequence[int] | None = None) -> list[str]:
    """What there is to say of bands that have one value everywhere in the training split, one line for each.

    Args:
        stats: of images of one kind.
        kind: such as uint8x4, where there are several.
        used: numbers of the bands that are looked at, from 1; None for all.
    """
    looked = list(used or range(1, len(stats.mean) + 1))
    flat = [band for band in looked if band <= len(stats.mean) and stats.min[band - 1] == stats.max[band - 1]]
    rest = ",".join(str(band) for band in looked if band not in flat)
    advice = f": leave it out with data.bands=[{rest}]" if rest else ""
    of = f" of {kind}" if kind else ""
    return [f"band {band}{of} is {stats.min[band - 1]:g} everywhere{advice}" for band in flat]


def overlap_line(overlap: Overlap) -> str:
    """An overlap in words."""
    (a, b), (one, other) = overlap.splits, overlap.example
    pairs = "1 pair of images" if overlap.pairs == 1 else f"{overlap.pairs} pairs of images"
    return f"{pairs} of {a} and {b} lie on each other, such as {one} ({a}) and {other} ({b})"


def copies_line(copies: Copies) -> str:
    """Copies in words."""
    (a, b), (one, other) = copies.splits, copies.example
    images = "1 image is a copy" if copies.images == 1 else f"{copies.images} images are copies"
    return f"in {b} {images} of what {a} holds, such as {other} ({b}) of {one} ({a})"


def fingerprint(manifest: Manifest) -> str:
    """SHA-256 of all that training can see: shards, classes, mask values."""
    seen = {
        "shards": [[s.split, s.sha256] for s in manifest.shards],
        "classes": manifest.classes,
        "mask_values": manifest.mask_values,
        "mask_ignore": manifest.mask_ignore,
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def encode(manifest: Manifest) -> bytes:
    """The manifest as canonical JSON."""
    return json.dumps(manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, where: str) -> Manifest:
    """The manifest in canonical JSON.

    Raises: DataError: another format version. IntegrityError: not a manifest, or its fingerprint does not fit.
    """
    manifest: Manifest | None = None
    found: object = None
    try:
        manifest = Manifest.model_validate_json(data)
        found = manifest.format
    except ValueError as error:
        found, kind = _format(data), type(error).__name__
    if found not in (None, FORMAT):
        raise DataError(
            f"{where} has manifest format {found}, this scalecv reads {FORMAT}: use the scalecv that wrote it, or "
            "ingest again"
        )
    if manifest is None:
        raise IntegrityError(f"{where} is not a manifest ({kind}): restore it or ingest again")
    if fingerprint(manifest) != manifest.fingerprint:
        raise IntegrityError(f"{where}: the fingerprint does not fit the facts: restore it or ingest again")
    return manifest


def _format(data: bytes) -> object:
    """The format that a manifest says it has; None for what is no manifest."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return tree.get("format") if isinstance(tree, dict) else None
