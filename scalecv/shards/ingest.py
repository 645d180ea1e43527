"""From a source to a dataset version: list, plan, work in units, add up, commit once.

    sources ─▶ plan (rows on disk, splits) ─▶ units ─▶ shards + records ─▶ facts ─▶ one Delta commit

A crash leaves shards and records of finished units below the target, and no version; the same command
finds the records and does only what is missing.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from scalecv import runtime, storage
from scalecv.errors import ConfigError, DataError, nearest
from scalecv.shards import cut as cuts
from scalecv.shards import plan as plans
from scalecv.shards import store
from scalecv.shards.commit import commit
from scalecv.shards.dispatch import run_units
from scalecv.shards.facts import Work, add_up, aside_rows, check_budget
from scalecv.shards.manifest import Tiling
from scalecv.shards.options import IngestOptions, IngestResult, Progress
from scalecv.shards.plan import Collected, UnitSettings
from scalecv.shards.record import Record
from scalecv.shards.store import Dataset
from scalecv.shards.unit import STAGING, record_uri, spec_uri, stage
from scalecv.sources.csv_table import csv_table, locate
from scalecv.sources.found import Found, LeftOut
from scalecv.sources.imagefolder import imagefolder
from scalecv.sources.masks import masks

__all__ = ["IngestOptions", "IngestResult", "Progress", "ingest"]
DEFAULT_SHARES = "80/10/10"


def ingest(options: IngestOptions, progress: Callable[[Progress], None] = lambda _: None) -> IngestResult:
    """Ingest a source as a new dataset, or (append) as a new version of one.

    What is there already is not made again: the same source and options give the existing version.

    Raises: ConfigError: options that cannot be. DataError: the source or the target is not what it should be, or
        too many images are bad. StorageDenied, StorageError: storage refuses or fails. Nothing is committed then.
    """
    clock = _Clock(progress)
    options = options.model_copy(
        update={"source": storage.absolute(options.source), "to": storage.absolute(options.to)}
    )
    shares = plans.parse_shares(options.split or DEFAULT_SHARES)
    parent = _parent(options)
    collected = plans.collect(cuts.cut(list_source(options), options, _source(options)), clock.listed)
    if not plans.totals(collected)[0]:
        raise DataError(_empty(options, collected))
    settings = _settings(options, collected, parent if options.append else None)
    said = _left_out(collected) + _grouped(options, collected)
    if options.append and parent is not None:
        held = plans.drop(collected, _held_paths(parent))
        said += [f"{held} images are in the dataset already, by their path"] if held else []
        bad = plans.drop_bad(collected, settings.source, _set_aside(parent))
        said += [f"{bad} images were set aside before and have not changed"] if bad else []
        if not plans.totals(collected)[0]:
            return _result(parent, clock, (*said, "nothing new: no version was made"), new_rows=0)
    held_groups = _held_groups(parent) if options.append and parent is not None else None
    said += plans.assign_splits(collected, shares, options.split is not None, held_groups)
    exact, loose = plans.identity(collected, settings, options.shard_mb)
    if parent is not None and not options.append:
        there = _known(options, parent, exact, loose)
        if there is not None:
            return _result(there, clock, ("this source was ingested before with these options",), new_rows=0)

    storage.check_writable(options.to)
    total, _ = plans.totals(collected)
    todo = _describe(options.to, plans.units(collected, settings, options.shard_mb))
    _run(options, todo, total, clock)
    clock.show("committing", total, total)
    work = Work(
        options.to,
        todo.units,
        settings,
        parent.manifest if parent and options.append else None,
        lambda path: plans.holds(collected, path),
    )
    manifest = add_up(work, options, said)
    if parent is not None and not options.append:
        return _compared(options, parent, manifest.fingerprint, clock)
    new = manifest.shards[len(work.parent.shards) if work.parent else 0 :]
    after = parent.version if parent else None
    version = commit(options.to, manifest, new, after, {"plan": exact, "plan_loose": loose})
    storage.delete(storage.join(options.to, STAGING, name) for name in storage.list_names(_staging(options.to)))
    made = Dataset(options.to, version, manifest)
    return _result(made, clock, manifest.warnings, sum(s.rows for s in new), todo.skipped)


def list_source(options: IngestOptions) -> Iterator[Found | LeftOut]:
    """What lies in the source, as its layout tells."""
    if options.layout == "csv":
        return csv_table(options.source, options.csv, options.group)
    if options.csv is not None:
        raise ConfigError(f"--csv {options.csv} goes with --layout csv, not {options.layout}")
    listing = imagefolder if options.layout == "imagefolder" else masks
    return listing(options.source, options.group, options.split_folders)


def _grouped(options: IngestOptions, collected: plans.Collected) -> list[str]:
    """What --group came to.

    Raises: ConfigError: it found no group at all.
    """
    if options.group is None:
        return []
    groups, without, path = plans.ungrouped(collected)
    if not groups:
        raise ConfigError(
            f"--group {options.group} is found in no path, such as {path}: nothing would be kept together"
        )
    alone = f"; {without} images have none, such as {path}, and may be torn apart" if without else ""
    return [f"{groups} groups by --group{alone}"]


@dataclass(frozen=True)
class _Todo:
    """The units of an ingest, in order."""

    units: tuple[str, ...]
    pending: tuple[str, ...]
    pending_bytes: int
    """Of the images and masks of the pending units."""
    done_rows: int
    """Rows of the units that an earlier ingest finished."""
    done_bad: Counter[str]

    @property
    def skipped(self) -> int:
        return len(self.units) - len(self.pending)


class _Clock:
    """Tells how far the ingest is, and at what rate."""

    def __init__(self, progress: Callable[[Progress], None]) -> None:
        self._progress = progress
        self._began = time.monotonic()
        self._work_began = self._began
        self._recent: deque[tuple[float, int]] = deque(maxlen=32)
        self.worked = 0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def images_per_s(self) -> float:
        """Since the work began, with the start of Ray."""
        return self.worked / max(time.monotonic() - self._work_began, 1e-9)

    def _rate(self) -> float:
        """Over the last units, so that neither a slow start nor another pace misleads."""
        self._recent.append((time.monotonic(), self.worked))
        (since, before), (now, worked) = self._recent[0], self._recent[-1]
        return (worked - before) / (now - since) if worked > before else self.images_per_s

    def listed(self, rows: int) -> None:
        self._progress(Progress("listing", rows, 0, 0, self.elapsed_s, rows / max(self.elapsed_s, 1e-9), None))

    def start_work(self) -> None:
        self._work_began = time.monotonic()

    def show(self, phase: Literal["ingesting", "committing"], rows: int, total: int, bad: int = 0) -> None:
        rate = self._rate()
        left_s = (total - rows) / rate if rate and phase == "ingesting" else None
        self._progress(Progress(phase, rows, total, bad, self.elapsed_s, rate, left_s))


def _run(options: IngestOptions, todo: _Todo, total: int, clock: _Clock) -> None:
    """Do the pending units; stop as soon as more images are bad than the budget of all of them allows."""
    bad, rows = Counter(todo.done_bad), todo.done_rows
    examples: dict[str, list[str]] = {}
    clock.start_work()
    clock.show("ingesting", rows, total, bad.total())
    for result in run_units(todo.pending, options.to, options.concurrency, total - rows, todo.pending_bytes):
        bad.update(json.loads(result["reasons"]))
        for reason, path in json.loads(result["examples"]).items():
            examples.setdefault(reason, [path])
        clock.worked += result["rows"] + result["bad"]
        rows += result["rows"] + result["bad"]
        clock.show("ingesting", rows, total, bad.total())
        if bad.total() > options.max_bad * total and rows < total:
            check_budget(bad, examples, rows - bad.total(), options.max_bad, unseen=total - rows)


@runtime.without_collector()
def _describe(target: str, units: Iterator[plans.Unit]) -> _Todo:
    """Write the descriptions of the units that an earlier ingest did not finish."""
    there = set(storage.list_names(_staging(target)))
    names, pending, pending_bytes, done_rows, bad = [], [], 0, 0, Counter[str]()
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(16) as pool:  # one after the other, 8,000 take minutes on an object store
        for unit in units:
            names.append(unit.name)
            record = _finished(target, unit.name) if unit.name + ".json" in there else None
            if record is not None:
                done_rows += record.rows + record.dropped + len(record.quarantine)
                bad.update(aside.reason for aside in record.quarantine)
                continue
            pending.append(unit.name)
            pending_bytes += unit.size_bytes
            waiting.append(pool.submit(stage, target, spec_uri(target, unit.name), unit.spec))
            if len(waiting) > 32:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    return _Todo(tuple(names), tuple(pending), pending_bytes, done_rows, bad)


def _finished(target: str, name: str) -> Record | None:
    """The record of a finished unit whose shard is there in full."""
    uri = record_uri(target, name)
    record = Record.decode(storage.get(uri), uri)
    if record.shard is None:
        return record
    entry = storage.head(storage.join(target, record.shard.path))
    return record if entry is not None and entry.size_bytes == record.shard.size_bytes else None


def _parent(options: IngestOptions) -> Dataset | None:
    """The dataset that is at the target, if any."""
    where = storage.without_secrets(options.to)
    if store.versions(options.to):
        return store.open_dataset(options.to)
    if options.append:
        raise DataError(f"no dataset at {where} to append to: check the place, or leave out --append")
    ours = (STAGING, store.FACTS, "split=")
    strange = [n for n in storage.list_names(options.to) if not n.startswith((*ours, "."))]
    if strange:
        raise DataError(f"{where} is not a dataset, it holds {', '.join(strange[:5])}: name a place that is empty")
    return None


def _settings(options: IngestOptions, collected: Collected, parent: Dataset | None) -> UnitSettings:
    kind = plans.kind_of(collected)
    old = parent.manifest if parent else None
    if old is not None and kind != old.kind:
        raise DataError(
            f"{options.source} has {_KINDS[kind]}, the dataset at {options.to} has {_KINDS[old.kind]}: "
            "append images of the same kind, or ingest into another place"
        )
    if old is not None and options.mask_ignore not in (None, old.mask_ignore):
        raise DataError(f"--mask-ignore {options.mask_ignore}: the dataset was made with {old.mask_ignore}")
    if options.mask_values and kind != "mask":
        raise ConfigError(f"--mask-values goes with masks, {options.source} has {_KINDS[kind]}")
    if options.classes and kind == "label":
        strange = sorted(set(plans.labels_of(collected)) - set(options.classes))
        if strange:
            raise DataError(
                f"{options.source} has the label {strange[0]}, --classes names {', '.join(options.classes[:8])}"
                f"{nearest(strange[0], options.classes)}: name all classes, or leave --classes out"
            )
    tiling = cuts.tiling(options)
    if old is not None and tiling != old.tiling:
        raise DataError(
            f"the dataset at {options.to} has {_tiles(old.tiling)}, this ingest would add {_tiles(tiling)}: append "
            "with the same --tile and --overlap, or ingest into another place"
        )
    return UnitSettings(
        source=_source(options),
        kind=kind,
        meta=old.meta if old else collected.meta,
        mask_values=options.mask_values,
        mask_ignore=old.mask_ignore if old else options.mask_ignore,
        row_group_bytes=int(options.row_group_mb * (1 << 20)),
        tile_px=options.tile,
        drop_empty=options.drop_empty,
    )


def _source(options: IngestOptions) -> str:
    """What paths are below: for a table the folder that holds it."""
    return locate(options.source, options.csv)[0] if options.layout == "csv" else options.source


def _tiles(tiling: Tiling | None) -> str:
    return f"tiles of {tiling.size_px} px that share {tiling.overlap_px}" if tiling else "whole images"


_KINDS = {"label": "class labels", "mask": "masks", "image": "no labels"}


def _known(options: IngestOptions, newest: Dataset, exact: str, loose: str) -> Dataset | None:
    """The version that this very ingest made; None if only its bytes can tell.

    Raises: DataError: the dataset was made from something else.
    """
    facts = {version: store.commit_facts(options.to, version) for version in store.versions(options.to)}
    for version, fact in facts.items():
        if fact.get("plan") == exact:
            return newest if version == newest.version else store.open_dataset(options.to, version)
    if any(fact.get("plan_loose") == loose for fact in facts.values()):
        return None
    raise DataError(_other(options, newest))


def _compared(options: IngestOptions, newest: Dataset, fingerprint: str, clock: _Clock) -> IngestResult:
    """The existing version whose content equals what was just ingested again."""
    for version in store.versions(options.to):
        if store.commit_facts(options.to, version).get("fingerprint") == fingerprint:
            there = store.open_dataset(options.to, version)
            return _result(there, clock, ("the same images were ingested before",), new_rows=0)
    raise DataError(_other(options, newest))


def _other(options: IngestOptions, newest: Dataset) -> str:
    where, facts = storage.without_secrets(options.to), newest.manifest
    return (
        f"{where} holds a dataset of other images or options (version {newest.version}, {facts.rows} rows of "
        f"{facts.source}): add to it with --append, or ingest into another place"
    )


def _held_paths(dataset: Dataset) -> Iterator[str]:
    for table in store.read_rows(dataset.uri, dataset.manifest.shards, ["image.path"]):
        for row in table.column("image").to_pylist():
            yield row["path"]


def _held_groups(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Each row's group with its split."""
    for split in dataset.manifest.splits:
        for table in store.read_rows(dataset.uri, dataset.manifest.shards_of(split), ["group"]):
            for group in table.column("group").unique().to_pylist():
                yield group, split


def _set_aside(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for rows in aside_rows(dataset.uri, dataset.manifest.quarantine):
        yield from rows


def _empty(options: IngestOptions, collected: Collected) -> str:
    where = storage.without_secrets(options.source)
    if not collected.left_out:
        return f"{where} is empty: expected images; check the path"
    why, (count, example) = max(collected.left_out.items(), key=lambda item: item[1][0])
    return f"no images in {where} for layout {options.layout}: {_files(count)} left out ({why}), such as {example}"


def _left_out(collected: Collected) -> list[str]:
    return [
        f"left out: {_files(count)} ({why}), such as {example}" for why, (count, example) in collected.left_out.items()
    ]


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _staging(target: str) -> str:
    return storage.join(target, STAGING)


def _result(
    dataset: Dataset, clock: _Clock, warnings: tuple[str, ...], new_rows: int, skipped_units: int = 0
) -> IngestResult:
    manifest = dataset.manifest
    return IngestResult(
        dataset=dataset.uri,
        version=dataset.version,
        fingerprint=manifest.fingerprint,
        rows=manifest.rows,
        quarantined=manifest.quarantine.rows,
        reasons=manifest.quarantine.reasons,
        splits=manifest.splits,
        classes=manifest.classes,
        warnings=warnings,
        new_rows=new_rows,
        skipped_units=skipped_units,
        images_per_s=clock.images_per_s if new_rows else 0.0,
        elapsed_s=clock.elapsed_s,
    )
