"""The facts of a dataset for people: as a table, as JSON, and as a picture of samples."""

import io
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalecv import storage
from scalecv.schema import SPLITS
from scalecv.shards.decode import decode_mask, decode_pixels
from scalecv.shards.manifest import Manifest
from scalecv.shards.store import Dataset, read_row_group

if TYPE_CHECKING:
    from rich.console import RenderableType

_TILE_PX = 128
_TEXT_PX = 14
_ROW_GROUPS = 12
"""Row groups that a picture reads at most."""
_OVERLAY = np.array(
    [(0, 0, 0), (255, 64, 64), (64, 160, 255), (64, 220, 96), (255, 200, 0), (200, 80, 255), (0, 220, 220)], np.float32
)
"""Colours of mask classes, repeated beyond the seventh; class 0 is left clear."""


def facts_json(dataset: Dataset) -> dict[str, Any]:
    """What `data show --json` prints: the manifest, without the long list of shards."""
    manifest = dataset.manifest
    tree = manifest.model_dump(mode="json", exclude={"shards"})
    sizes = [shard.size_bytes for shard in manifest.shards]
    return {
        "dataset": dataset.uri,
        "version": dataset.version,
        "rows": manifest.rows,
        "quarantined": manifest.quarantine.rows,
        **tree,
        "shards": {
            "count": len(sizes),
            "bytes": sum(sizes),
            "row_groups": sum(len(shard.row_groups) for shard in manifest.shards),
        },
    }


def print_facts(dataset: Dataset) -> None:
    """Write the facts to stdout, as wide as the terminal is."""
    from rich.console import Console

    Console().print(facts_table(dataset))


def facts_table(dataset: Dataset) -> "RenderableType":
    """The facts as tables for a terminal."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(dataset):
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    parts: list[RenderableType] = [facts]
    if dataset.manifest.classes:
        parts += ["", _class_table(dataset.manifest)]
    if dataset.manifest.stats:
        parts += ["", _band_table(dataset.manifest)]
    return Group(*parts)


def sample_grid(dataset: Dataset, path_png: str, count: int = 32) -> str:
    """Write a picture of samples, the classes in turn; masks lie over their images. Where it is.

    Rasters show their bands 1 to 3, each stretched between its percentiles 2 and 98; reads few row groups.
    """
    import PIL.Image
    import PIL.ImageDraw

    rows = list(_samples(dataset, count))
    across = min(8, max(1, len(rows)))
    down = -(-max(1, len(rows)) // across)
    step = _TILE_PX + _TEXT_PX + 4
    sheet = PIL.Image.new("RGB", (across * (_TILE_PX + 4), down * step), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        x, y = place % across * (_TILE_PX + 4) + 2, place // across * step + 2
        tile = PIL.Image.fromarray(_picture(row, dataset.manifest))
        tile.thumbnail((_TILE_PX, _TILE_PX))
        if max(tile.size) < _TILE_PX:
            grown = _TILE_PX / max(tile.size)
            size = (max(1, round(tile.width * grown)), max(1, round(tile.height * grown)))
            tile = tile.resize(size, PIL.Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        pen.text((x, y + _TILE_PX), _caption(row), fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    storage.put(path_png, out.getvalue())
    return storage.absolute(path_png)


def _samples(dataset: Dataset, count: int) -> Iterator[dict[str, Any]]:
    """Rows of a few row groups, the classes (or the splits) in turn."""
    groups = [(s, i) for s in dataset.manifest.shards for i in range(len(s.row_groups))]
    step = max(1, len(groups) // _ROW_GROUPS)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for shard, index in groups[::step][:_ROW_GROUPS]:
        head = read_row_group(dataset.uri, shard, index, ["label"])
        labels = head.column("label").to_pylist()
        taken = {kind: len(rows) for kind, rows in by_kind.items()}
        wanted = []
        for place, label in enumerate(labels):
            kind = label or shard.split
            if taken.get(kind, 0) < count:
                taken[kind] = taken.get(kind, 0) + 1
                wanted.append(place)
        if wanted:
            for row in read_row_group(dataset.uri, shard, index).take(wanted).to_pylist():
                by_kind.setdefault(row["label"] or shard.split, []).append({**row, "split": shard.split})
        if sum(map(len, by_kind.values())) >= 4 * count and len(by_kind) >= max(1, len(dataset.manifest.classes)):
            break
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(by_kind[k] for k in sorted(by_kind))))
    yield from itertools.islice((row for row in turns if row is not None), count)


def _picture(row: dict[str, Any], manifest: Manifest) -> NDArray[np.uint8]:
    """[H, W, 3] for the eye."""
    pixels = decode_pixels(row["image"]["bytes"])
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    if row["format"] == "TIFF" or shown.dtype != np.uint8:
        values = np.nan_to_num(shown.astype(np.float32))
        low, high = np.percentile(values, (2, 98), axis=(0, 1))
        shown = np.clip((values - low) / np.maximum(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    if row["mask"] is None:
        return np.ascontiguousarray(shown, np.uint8)
    mask = decode_mask(row["mask"]["bytes"])
    blended = shown.astype(np.float32)
    for number, value in enumerate(manifest.mask_values):
        if number:
            colour = _OVERLAY[(number - 1) % (len(_OVERLAY) - 1) + 1]
            where = mask == value
            blended[where] = 0.55 * blended[where] + 0.45 * colour
    return blended.astype(np.uint8)


def _caption(row: dict[str, Any]) -> str:
    name = row["label"] or row["image"]["path"].rpartition("/")[2]
    return f"{row['split']} {name}"[:21].encode("latin-1", "replace").decode("latin-1")


def _lines(dataset: Dataset) -> Iterator[tuple[str, str]]:
    manifest = dataset.manifest
    yield "dataset", f"{dataset.uri}  version {dataset.version}"
    yield "source", f"{manifest.source}  ({manifest.layout}, {manifest.created_at})"
    yield "fingerprint", manifest.fingerprint
    yield (
        "rows",
        f"{manifest.rows:,}  ({', '.join(f'{s} {manifest.splits[s]:,}' for s in SPLITS if s in manifest.splits)})",
    )
    min_w, min_h, max_w, max_h = manifest.sizes_px
    yield "size", f"{min_w}x{min_h} px" + (f" to {max_w}x{max_h} px" if (min_w, min_h) != (max_w, max_h) else "")
    yield "pixels", ", ".join(f"{key}: {rows:,}" for key, rows in manifest.band_counts.items())
    yield "formats", ", ".join(f"{name}: {rows:,}" for name, rows in manifest.formats.items())
    size = sum(shard.size_bytes for shard in manifest.shards)
    yield "shards", f"{len(manifest.shards)}, {size / 1e6:,.1f} MB"
    reasons = ", ".join(f"{reason}: {rows:,}" for reason, rows in manifest.quarantine.reasons.items())
    yield "set aside", f"{manifest.quarantine.rows:,}" + (f"  ({reasons})" if reasons else "")
    for warning in manifest.warnings:
        yield "note", warning


def _class_table(manifest: Manifest) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    unit = "pixels" if manifest.kind == "mask" else "images"
    table = Table("number", "class", box=None, pad_edge=False)
    counted = {split: manifest.class_counts[split] for split in SPLITS if split in manifest.class_counts}
    for split in counted:
        table.add_column(f"{split}, {unit}", justify="right")
        table.add_column("share", justify="right")
    sums = {split: sum(counts.values()) for split, counts in counted.items()}
    for number, name in enumerate(manifest.classes):
        cells = []
        for split, counts in counted.items():
            count = counts.get(name, 0)
            cells += [f"{count:,}", f"{count / max(1, sums[split]):.1%}"]
        table.add_row(str(number), escape(name), *cells)
    return table


def _band_table(manifest: Manifest) -> "RenderableType":
    from rich.table import Table

    table = Table("train", "band", "mean", "std", "min", "max", box=None, pad_edge=False)
    for key, stats in manifest.stats.items():
        for band, (mean, std, low, high) in enumerate(zip(stats.mean, stats.std, stats.min, stats.max, strict=True), 1):
            table.add_row(key if band == 1 else "", str(band), f"{mean:.4g}", f"{std:.4g}", f"{low:.4g}", f"{high:.4g}")
    return table
