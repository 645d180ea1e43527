"""The shared contract of the data path: columns of a row, keys of a batch.

A row is one line of a shard (Parquet). Encoded bytes travel; pixels are made when a batch is made.

| column | type | what |
|---|---|---|
| `id` | string | 32 hex digits from the path below the source and the SHA-256 of the bytes: moving the data keeps it |
| `image` | struct<bytes: binary, path: string> | the file as it came, and its path below the source |
| `sha256` | string | of the image bytes, 64 hex digits |
| `width`, `height`, `bands` | int32 | pixels and channels as decoded (EXIF orientation applied) |
| `format` | string | PNG, JPEG, WEBP, GIF, BMP or TIFF, by content |
| `nodata` | double or null | value of pixels without data, as the raster says |
| `label` | string or null | class name (classification) |
| `mask` | struct<bytes, path> or null | mask file as it came (segmentation), same width and height as the image |
| `group` | string | what the split keeps together: a track, a scene; the path itself if nothing was named |
| `meta_…` | string | further columns of a CSV |
| `split` | string | train, val or test; a partition column of the Delta table, so not in the files |
"""

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "val", "test")
META = "meta_"


class Batch(TypedDict, total=False):
    """What a data feed yields, on one rank. B images, C channels, H x W pixels."""

    image: "torch.Tensor"
    """[B, C, H, W] in the dtype of the files (uint8, uint16, int16 or float32); not normalised."""
    label: "torch.Tensor"
    """int64 [B], place in the manifest's classes (classification)."""
    mask: "torch.Tensor"
    """int64 [B, H, W], place in the manifest's classes, IGNORE where not labelled (segmentation)."""
    valid: "torch.Tensor"
    """bool [B]; False marks a row that only fills the batch and counts nowhere."""
    id: list[str]
    """Row ids."""
    path: list[str]
    """Paths of the images in the source that was ingested."""
    position: "torch.Tensor"
    """int64 [B], place of the row in the global order of the epoch; -1 where not valid."""


IGNORE = -100
"""Label of pixels that count nowhere: nodata, or a mask value named at ingest."""
