"""What an ingest is asked to do, how far it is, and what it made."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from scalecv.config import Frozen

Layout = Literal["imagefolder", "csv", "masks"]


class IngestOptions(Frozen):
    """What to ingest, and how."""

    source: str
    """Path or s3://, gs://, az:// URI of a folder, or of a CSV or TSV."""
    to: str
    """Path or URI of the dataset."""
    layout: Layout
    """How the source is laid out."""
    append: bool = False
    """Add the images that the dataset does not hold yet, as a new version."""
    group: str | None = None
    """What a split keeps together: columns of the CSV, else a regular expression with capture groups on the path."""
    split: str | None = None
    """Shares of train/val/test for images without a split; empty means 80/10/10, or 10 % of train as val."""
    split_folders: dict[str, Literal["train", "val", "test"]] = {}
    """Top folder -> split, for folders that are not named train, val or test."""
    csv: str | None = None
    """Name of the table in the source (layout csv)."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their numbers; empty sorts those found."""
    mask_values: tuple[int, ...] = ()
    """Values that masks may hold, in the order of the classes; empty takes those found."""
    mask_ignore: int | None = None
    """Value of mask pixels that count nowhere."""
    tile: int | None = Field(None, ge=8, le=8192)
    """Side in pixels of the windows that large rasters are cut into; empty takes images as they are."""
    overlap: int = Field(0, ge=0)
    """Pixels that neighbouring windows share at least."""
    drop_empty: bool = False
    """Leave out windows without a valid pixel: nodata, or a mask value that is ignored."""
    split_by: Literal["scene", "block"] | None = None
    """What a split keeps together: scenes that lie on each other (usual with `tile`), or square blocks of them."""
    block: str | None = None
    """Side of a block: pixels, as 4096, or units of the map, as 2000map."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """Largest share of images that may be set aside."""
    shard_mb: int = Field(128, ge=1, le=2048)
    """Largest size of a shard, megabytes of source files."""
    row_group_mb: float = Field(4.0, gt=0, le=256)
    """Encoded megabytes in a row group, the unit of reading."""
    concurrency: int | None = Field(None, ge=0)
    """Units of work at the same time; empty takes all CPUs of the cluster, or works here without Ray where that is
    done before Ray has started; 0 works here."""


@dataclass(frozen=True)
class Progress:
    """How far an ingest is."""

    phase: Literal["listing", "ingesting", "committing"]
    rows: int
    """Images done (listed, while listing)."""
    total: int
    """Images in all; 0 while listing."""
    quarantined: int
    elapsed_s: float
    images_per_s: float
    left_s: float | None
    """Expected time left; None while unknown."""


@dataclass(frozen=True)
class IngestResult:
    """What an ingest made, or found to be there already."""

    dataset: str
    version: int
    fingerprint: str
    rows: int
    """Rows of the whole version."""
    quarantined: int
    """Images set aside, of the whole version."""
    reasons: dict[str, int]
    """Reason -> images set aside."""
    splits: dict[str, int]
    """Split -> rows."""
    classes: tuple[str, ...]
    warnings: tuple[str, ...]
    new_rows: int
    """Rows that this ingest added; 0 if everything was there already."""
    skipped_units: int
    """Units of work that an interrupted ingest had finished before."""
    images_per_s: float
    elapsed_s: float
