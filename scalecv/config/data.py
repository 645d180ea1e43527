"""Which dataset, how its images become tensors, and what a node keeps of what it read."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from scalecv.config.frozen import Frozen


class Augment(Frozen):
    """Random changes of training images, applied to image and target together.

    Each is drawn from (seed, epoch, sample id) alone, so it is the same on any number of workers.
    """

    hflip: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip."""
    vflip: float = Field(0.0, ge=0, le=1)
    """Probability of an up-down flip."""
    rot90: bool = False
    """Rotate by a random multiple of 90 degrees (square images)."""
    pad_crop_px: int = Field(0, ge=0)
    """Pad by this many pixels on each side (reflected), then crop back at a random place."""
    resized_crop: tuple[float, float] | None = None
    """Crop a random share of the area in this range, then resize to data.size_px."""
    rotate_deg: float = Field(0.0, ge=0, le=180)
    """Largest rotation to either side, degrees."""
    translate: float = Field(0.0, ge=0, le=0.5)
    """Largest shift to each side, share of the image side."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Largest change of scale: 0.1 means 0.9 to 1.1."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Largest relative change of brightness."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Largest relative change of contrast."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of blanking one random rectangle (2 to 20 % of the area) of the image."""
    noise: float = Field(0.0, ge=0, le=2)
    """Largest standard deviation of Gaussian noise, in standard deviations of each band."""
    blur_px: float = Field(0.0, ge=0, le=10)
    """Largest standard deviation of a Gaussian blur, pixels."""
    band_gain: float = Field(0.0, ge=0, lt=1)
    """Largest relative change of contrast, each band by itself: 0.1 means 0.9 to 1.1 around the band's mean."""
    band_offset: float = Field(0.0, ge=0, le=2)
    """Largest change of brightness, each band by itself, in standard deviations of the band."""
    band_drop: float = Field(0.0, ge=0, le=1)
    """Probability that one random band is set to its mean, so that the network does not lean on a single one."""

    @property
    def changes_bands(self) -> bool:
        """Whether values are changed in units of the dataset's bands."""
        return any((self.noise, self.blur_px, self.band_gain, self.band_offset, self.band_drop))

    @property
    def changes_values(self) -> bool:
        """Whether values are changed at all; those without data then have to be known."""
        return self.changes_bands or bool(self.brightness or self.contrast)

    @field_validator("resized_crop")
    @classmethod
    def _share(cls, v: tuple[float, float] | None) -> tuple[float, float] | None:
        if v is not None and not 0 < v[0] <= v[1] <= 1:
            raise ValueError("needs 0 < smallest <= largest <= 1")
        return v


class Sampling(Frozen):
    """Which rows an epoch of training draws more often than others; validation and test take each row once.

    An epoch has as many draws as rows, and rows of one kind differ by one draw at most.
    """

    positive: float | None = Field(None, gt=0, le=1)
    """Segmentation: share of an epoch's draws from images with foreground (any class but the first)."""
    min_share: float = Field(0.0, ge=0, lt=1)
    """Share of an image's labelled pixels above which its foreground counts."""
    balance: float | None = Field(None, gt=0, le=1)
    """Classification: a class of n rows gets draws in proportion to n^(1 - balance); 1 draws all equally often."""
    most: float = Field(100.0, ge=1)
    """Most draws of a row in an epoch, on average; rarer kinds stay below their share."""

    @model_validator(mode="after")
    def _one(self) -> "Sampling":
        if self.positive is not None and self.balance is not None:
            raise ValueError("positive is for masks, balance for labels: set one of them")
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything is drawn more often."""
        return self.positive is not None or self.balance is not None


class Data(Frozen):
    """Which dataset, and how its images become tensors."""

    uri: str
    """Dataset to train on: a path, s3://, gs:// or az:// URI that `scalecv ingest` wrote."""
    version: int | None = Field(None, ge=0)
    """Version of the dataset; empty means the newest."""
    get: str = ""
    """One line that tells how to get the data, shown when it is not there."""
    size_px: int | None = Field(None, ge=1, le=8192)
    """Side of the square that images are resized to; empty keeps the native size, which must then be one size."""
    resize: Literal["stretch", "crop"] = "stretch"
    """How a non-square image becomes square: stretch it, or cut its centre."""
    color: Literal["auto", "rgb", "gray", "native"] = "auto"
    """Channels of photographs: native ones if all images agree, else rgb; rasters always keep their bands."""
    bands: tuple[int, ...] | None = None
    """Bands to use, counted from 1 in the order of the file; empty means all."""
    augment: Augment = Augment()
    """Random changes of training images."""
    sampling: Sampling = Sampling()
    """Which training rows are drawn more often."""
    limit: int | None = Field(None, ge=1)
    """Rows of the training split to use, for a quick try: drawn by the seed, each class with its share; empty: all."""
    window_mb: int = Field(128, ge=1)
    """Encoded megabytes among which rows are shuffled, over all workers together."""
    reader: Literal["auto", "ray", "threads"] = "auto"
    """Who reads row groups: Ray Data, or threads of the training process; auto: Ray Data when Ray Train runs."""
    decode: Literal["auto", "trainer", "cluster", "gpu"] = "auto"
    """Who decodes: threads of the training process; free CPUs of the cluster too; auto: these if training waits; gpu:
    the GPU decodes the JPEGs of a training with labels, to slightly other pixels (needs the extra `gpu`).
    """
    decode_threads: int | None = Field(None, ge=1)
    """Threads that decode images in each training process; empty means its share of the cores."""
    allow_leak: tuple[Literal["overlap", "copies"], ...] = ()
    """Leaks between splits to train in spite of, by name; overlap: images of two splits lie on each other; copies: two
    splits hold the same image.
    """
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of a split's rows that a run may leave out because their bytes are damaged or gone; more stops it."""

    @field_validator("bands")
    @classmethod
    def _bands(cls, v: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if v is not None and (not v or min(v) < 1 or len(set(v)) != len(v)):
            raise ValueError("needs different band numbers, counted from 1")
        return v


class Cache(Frozen):
    """A place on each node's disk for what was read from a bucket, shared by all workers and runs of the node."""

    dir: str | None = None
    """Folder on a local disk; empty reads from the bucket in each epoch."""
    max_gb: float = Field(50.0, gt=0)
    """Most gigabytes (10^9 bytes) in the folder; what was used longest ago goes first."""
    pixels: Literal["auto", "yes", "no"] = "auto"
    """Whether decoded images are kept too, so that a node decodes each once for all epochs and runs; auto: in a sweep.
    They take up to half of max_gb; without dir they lie in ~/.cache/scalecv.
    """
