"""From the records of finished units to the facts of a dataset version, or to the reason why there is none."""

import datetime
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from scalecv import runtime, storage
from scalecv.errors import DataError
from scalecv.schema import SPLITS
from scalecv.shards import manifest as manifests
from scalecv.shards.contents import Contents
from scalecv.shards.cut import tiling
from scalecv.shards.examine import MAX_MASK_VALUES, NOTES, Note
from scalecv.shards.manifest import Manifest, Quarantine
from scalecv.shards.options import IngestOptions
from scalecv.shards.places import Places
from scalecv.shards.plan import UnitSettings
from scalecv.shards.record import Aside, BandSums, Record, Totals
from scalecv.shards.row_facts import RowFactsWriter
from scalecv.shards.store import put_facts
from scalecv.shards.unit import overtaken, record_uri

_COLUMNS = ("uri", "path", "stage", "reason", "detail", "size_bytes", "sha256")


@dataclass(frozen=True)
class Work:
    """What was planned for one version."""

    uri: str
    """The dataset."""
    units: tuple[str, ...]
    settings: UnitSettings
    parent: Manifest | None
    """The version to append to."""
    is_retried: Callable[[str], bool]
    """Whether a path below the source is part of this ingest."""


@runtime.without_collector()
def add_up(work: Work, options: IngestOptions, said: Sequence[str]) -> Manifest:
    """The manifest of what the units made; quarantine and notes are written, nothing is committed.

    Args:
        work: the units, all of them finished.
        options: the user's.
        said: warnings so far.

    Raises: DataError: too many images are bad, none is good, or their masks cannot be classes.
    """
    totals = Totals()
    with tempfile.TemporaryDirectory(prefix="scalecv-") as folder:
        rows = RowFactsWriter(Path(folder) / "rows.parquet", work.settings.kind)
        bad, odd = _Asides(Path(folder) / "quarantine.parquet"), _Asides(Path(folder) / "notes.parquet")
        places, contents = Places(Path(folder) / "footprints.parquet"), Contents(Path(folder) / "contents")
        if work.parent is not None:
            rows.copy(work.uri, work.parent)
            contents.copy(work.uri, work.parent)
            for writer, facts in ((bad, work.parent.quarantine), (odd, work.parent.notes)):
                writer.copy(work.uri, facts, work)
            for some in aside_rows(work.uri, work.parent.footprints):
                places.add_rows(some)
        for record in _records(work):
            totals.add(record)
            rows.add(record)
            bad.add(work.settings.source, record.quarantine)
            odd.add(work.settings.source, record.notes)
            places.add(record)
            contents.add([record.split] * record.rows, record.row_contents or [None] * record.rows)
        check_budget(totals.reasons, totals.examples, sum(totals.splits.values()), options.max_bad)
        quarantine, notes = bad.put(work.uri), odd.put(work.uri)
        overlaps, strangers = places.overlaps()
        footprints = places.put(work.uri)
        row_facts = rows.put(work.uri)
        parents = work.parent.shards if work.parent else ()
        copies = contents.copies(work.uri, (*parents, *totals.shards))
    files = {
        "quarantine": quarantine,
        "notes": notes,
        "footprints": footprints,
        "overlaps": overlaps,
        "copies": copies,
        "row_facts": row_facts,
    }
    return _manifest(work, options, totals, files, (*said, *_stranger_lines(strangers)))


def check_budget(
    reasons: Counter[str], examples: dict[str, list[str]], good: int, max_bad: float, unseen: int = 0
) -> None:
    """See that few enough images are bad.

    Args:
        reasons: reason -> bad images.
        examples: reason -> some of their paths.
        good: good images.
        max_bad: largest share of bad ones.
        unseen: images that were not looked at yet; they count as good.

    Raises: DataError: more than `max_bad` of them are, or all; with the reasons.
    """
    bad = reasons.total()
    total = good + bad + unseen
    if not bad or (total > bad and bad <= max_bad * total):
        return
    lines = [
        f"  {count} {reason}" + (f", such as {', '.join(examples[reason])}" if examples.get(reason) else "")
        for reason, count in reasons.most_common()
    ]
    first = f"the first {good + bad} of " if unseen else ""
    share = f"{bad} of {first}{total} images cannot be used, at most {max_bad:.0%} may be set aside"
    advice = "repair them" if bad == total else "repair them, or raise --max-bad"
    raise DataError("\n".join([f"{share}; nothing was committed:", *lines, advice]))


def _manifest(
    work: Work, options: IngestOptions, totals: Totals, files: Mapping[str, Any], said: Sequence[str]
) -> Manifest:
    parent, settings = work.parent, work.settings
    classes, values = _classes(work, options, totals)
    names = dict(zip(values, classes, strict=False))
    counts: dict[str, Counter[str]] = {s: Counter(c) for s, c in (parent.class_counts if parent else {}).items()}
    for split, labels in totals.labels.items():
        counts.setdefault(split, Counter()).update(labels)
    for split, pixels in totals.mask_values.items():
        counts.setdefault(split, Counter()).update({names[v]: n for v, n in pixels.items() if v in names})
    sums = {key: BandSums.of(stats) for key, stats in (parent.stats if parent else {}).items()}
    for key, more in totals.sums.items():
        sums[key] = sums[key].plus(more) if key in sums else more
    sizes = totals.sizes_px or [0, 0, 0, 0]
    if parent is not None:
        low, high = zip(parent.sizes_px[:2], sizes[:2], strict=True), zip(parent.sizes_px[2:], sizes[2:], strict=True)
        sizes = [min(pair) for pair in low] + [max(pair) for pair in high]
    manifest = Manifest(
        layout=options.layout,
        source=storage.without_secrets(settings.source),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        parent=parent.fingerprint if parent else None,
        fingerprint="",
        kind=settings.kind,
        classes=classes,
        class_counts={s: {c: counts[s][c] for c in classes if counts[s][c]} for s in SPLITS if counts.get(s)},
        mask_values=values,
        mask_ignore=settings.mask_ignore,
        splits=_sum(parent.splits if parent else {}, totals.splits),
        sizes_px=(sizes[0], sizes[1], sizes[2], sizes[3]),
        formats=_sum(parent.formats if parent else {}, totals.formats),
        stats={key: sums[key].stats() for key in sorted(sums)},
        band_counts=_sum(parent.band_counts if parent else {}, totals.bands),
        encoded_bytes=(parent.encoded_bytes if parent else 0) + totals.encoded_bytes,
        meta=settings.meta,
        shards=(*(parent.shards if parent else ()), *totals.shards),
        tiling=tiling(options),
        crs=_sum(parent.crs if parent else {}, totals.crs),
        **files,
    )
    return manifest.model_copy(
        update={
            "fingerprint": manifests.fingerprint(manifest),
            "warnings": (
                *said,
                *_note_lines(totals),
                *_class_lines(manifest),
                *_raster_lines(totals),
                *_band_lines(manifest),
                *_place_lines(manifest, totals, parent),
            ),
        }
    )


def _classes(work: Work, options: IngestOptions, totals: Totals) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names by number, and the mask values that stand for them."""
    known = work.parent.classes if work.parent else options.classes
    if work.settings.kind == "label":
        seen = {label for labels in totals.labels.values() for label in labels}
        return (*known, *sorted(seen - set(known), key=_natural)), ()
    if work.settings.kind != "mask":
        return (), ()
    declared = work.parent.mask_values if work.parent else options.mask_values
    found = {value for pixels in totals.mask_values.values() for value in pixels} - {work.settings.mask_ignore}
    values = (*declared, *sorted(found - set(declared)))
    if len(values) > MAX_MASK_VALUES:
        raise DataError(
            f"the masks hold {len(values)} different values, at most {MAX_MASK_VALUES} are classes; nothing was "
            "committed: declare the classes with --mask-values 0,1,…"
        )
    if options.classes and len(options.classes) != len(values):
        raise DataError(
            f"--classes names {len(options.classes)} classes, the masks hold {len(values)} values "
            f"({', '.join(map(str, values[:8]))}); nothing was committed: name one class for each value"
        )
    return (*known, *(str(v) for v in values[len(known) :])), values


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers by size, then names by letters."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


def _note_lines(totals: Totals) -> Iterator[str]:
    for note, count in totals.notes.most_common():
        what, such = NOTES[cast("Note", note)], ", ".join(totals.examples[note])
        yield f"{count} images kept with the note {note} ({what}), such as {such}"


def _class_lines(manifest: Manifest) -> Iterator[str]:
    train = manifest.class_counts.get("train", {})
    if manifest.kind != "image" and len(manifest.classes) == 1:
        yield f"there is one class only ({manifest.classes[0]}): nothing can be learnt from these labels"
    for split in ("val", "test"):
        lacking = [name for name in manifest.class_counts.get(split, {}) if name not in train]
        if lacking and train:
            yield f"{split} holds classes that train lacks: {', '.join(lacking[:8])}{' …' if len(lacking) > 8 else ''}"
    empty = [name for name in manifest.classes if not any(name in c for c in manifest.class_counts.values())]
    if empty:
        yield f"no image shows the declared classes {', '.join(empty[:8])}{' …' if len(empty) > 8 else ''}"


def _band_lines(manifest: Manifest) -> Iterator[str]:
    for kind, stats in manifest.stats.items():
        if stats.pixels and len(stats.mean) > 1:
            yield from manifests.constant_bands(stats, kind if len(manifest.stats) > 1 else "")


def _place_lines(manifest: Manifest, totals: Totals, parent: Manifest | None) -> Iterator[str]:
    if totals.dropped:
        yield f"{totals.dropped} windows without a valid pixel were left out (--drop-empty)"
    for overlap in manifest.overlaps:
        yield (
            f"{manifests.overlap_line(overlap)}: scores there will be too good, and train refuses them; split by "
            "place: --split-by scene, --split-by block with --tile, or --split-folder"
        )
    for copies in manifest.copies:
        yield (
            f"{manifests.copies_line(copies)}: scores there will be too good, and train refuses them; leave the copies "
            "out of the source, or keep them together with --group"
        )
    if parent is not None and not parent.row_facts.has_contents:
        yield "the version before does not say what its images hold: copies of them are not known"
    if manifest.footprints.rows and parent is not None and not parent.footprints.rows:
        yield "the version before does not say where its rows lie: overlaps with them are not known"


def _stranger_lines(paths: Sequence[str]) -> Iterator[str]:
    if paths:
        count = "1 image is" if len(paths) == 1 else f"{len(paths)} images are"
        yield (
            f"{count} not compared with those of other coordinate systems: theirs is a local one, or the "
            f"coordinates lie outside of it, such as {min(paths)}; check its georeference, for overlaps may be missed"
        )


def _raster_lines(totals: Totals) -> Iterator[str]:
    if len(totals.rasters) > 1:
        kinds = ", ".join(
            f"{totals.bands[key]} of {key} such as {totals.rasters[key]}" for key in sorted(totals.rasters)
        )
        yield f"rasters differ in dtype or bands: {kinds}; a model takes one kind, choose with data.bands"


def _records(work: Work) -> Iterator[Record]:
    """The units' records in order, fetched a few at a time."""

    def read(name: str) -> Record:
        where = record_uri(work.uri, name)
        try:
            return Record.decode(storage.get(where), where)
        except FileNotFoundError:
            raise overtaken(work.uri) from None

    names = iter(work.units)
    with ThreadPoolExecutor(8) as pool:
        while batch := list(islice(names, 32)):
            yield from pool.map(read, batch)


def aside_rows(uri: str, facts: Quarantine) -> Iterator[list[dict[str, Any]]]:
    """What a version set aside, or noted, some rows at a time."""
    if facts.path is None:
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = storage.get(storage.join(uri, facts.path), sha256=facts.sha256)
    for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches():
        yield batch.to_pylist()


class _Asides:
    """Streams samples that were set aside or noted into one Parquet file."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        kinds = dict.fromkeys(_COLUMNS, pa.string()) | {"size_bytes": pa.int64()}
        self._schema = pa.schema(kinds)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._reasons: Counter[str] = Counter()

    def add(self, source: str, asides: Iterable[Aside]) -> None:
        """Take the samples of one unit."""
        where = storage.without_secrets(source)
        self._write([{"uri": storage.join(where, a.path), **a.model_dump()} for a in asides])

    def copy(self, uri: str, facts: Quarantine, work: Work) -> None:
        """Take over what an earlier version set aside, but for what this ingest tries again."""
        for rows in aside_rows(uri, facts):
            source = storage.without_secrets(work.settings.source)
            again = [r["uri"] == storage.join(source, r["path"]) and work.is_retried(r["path"]) for r in rows]
            self._write([row for row, is_again in zip(rows, again, strict=True) if not is_again])

    def put(self, uri: str) -> Quarantine:
        """Write the file below the dataset, if it holds anything."""
        self._writer.close()
        if not self._reasons:
            return Quarantine()
        path, sha256 = put_facts(uri, self._path.read_bytes(), "parquet")
        return Quarantine(rows=self._reasons.total(), reasons=dict(self._reasons), path=path, sha256=sha256)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))
            self._reasons.update(row["reason"] for row in rows)


def _sum(a: dict[str, int], b: Counter[str]) -> dict[str, int]:
    both = Counter(a)
    both.update(b)
    order = {name: i for i, name in enumerate(SPLITS)}
    return {key: both[key] for key in sorted(both, key=lambda k: (order.get(k, 9), k)) if both[key]}
