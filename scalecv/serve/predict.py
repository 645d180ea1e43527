"""`scalecv predict MODEL SOURCE --to URI`: a bundle on files or on a dataset, here or on the nodes of a cluster.

    source ── listed ──▶ chunks ── Worker (here, or Ray actors) ──▶ outputs + record ──▶ summary

Chunks are named by what they hold and by the model, so the same command again does what has no record.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scalecv import errors, runtime, storage
from scalecv.artifacts import bundle, tracking
from scalecv.errors import ConfigError, DataError, ScalecvError, nearest
from scalecv.serve.predict_chunk import RECORDS, Job, Worker, chunk_name
from scalecv.serve.predictor import windows_for
from scalecv.shards import store
from scalecv.sources.found import is_image

HERE_BYTES = 256 << 20
"""Encoded images that one process predicts in less time than Ray takes to start and load models."""
CHUNK_FILES, CHUNK_BYTES = 256, 64 << 20
JOB = "job.json"
Chunk = dict[str, Any]
Event = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a prediction made."""

    uri: str
    """Where predictions lie."""
    rows: int
    """Images that were predicted, also by an earlier command."""
    quarantined: int
    """Images that could not be."""
    reasons: dict[str, int]
    skipped: int
    """Images that an earlier command had done."""
    task: str
    model: str
    weights_hash: str


def predict(
    model: str,
    source: str,
    to: str,
    *,
    split: str | None = None,
    version: int | None = None,
    batch: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    probability: Literal["float32", "uint8"] | None = None,
    concurrency: int | None = None,
    allow_import: bool = False,
    tell: Callable[[Event], None] = lambda _: None,
) -> Result:
    """Predict every image of a source.

    classify writes Parquet files (id, path, split, class, probability), segment one Cloud-Optimized GeoTIFF with the
    image's georeference for each TIFF, one PNG for each other image, with the numbers that the masks had.

    Args:
        model: bundle folder, runs:/ID or models:/NAME@ALIAS.
        source: a dataset, a folder or bucket of images, or one image.
        to: where predictions go.
        split: of a dataset; None takes all.
        version: of a dataset; None takes the newest.
        batch: images or windows that go through the network together; None takes about a million pixels, 8 on a GPU.
        tile: side of the windows of a scene in pixels; None takes that of the images of training where those were
            resized, else 512. The network sees windows at the scale of training.
        overlap: pixels that windows share at least; None takes a quarter of the side.
        probability: also write the probability of each class, as float32 or as 0 to 254.
        concurrency: models at the same time in Ray; None takes the cluster's CPUs or GPUs, or none where the source is
            small and no cluster is at hand; 0 works here.
        allow_import: let a bundle whose network is the user's own function import it.
        tell: called with progress events.

    Raises: UserError: nothing to predict, or the target holds other predictions. ScalecvError: no image could be
        predicted, or storage or the model failed.
    """
    source, to = storage.absolute(source), storage.absolute(to)
    uri = storage.absolute(tracking.lookup(model))
    facts = bundle.read_facts(uri)
    windows = windows_for(facts.pixels.size_px, facts.pixels.sides_px, tile, overlap)
    if windows.overlap_px >= windows.side_px:
        own = "" if tile else ", which this model takes where none is given"
        raise ConfigError(f"--overlap {overlap}: expected less than --tile {windows.side_px}{own}")
    if facts.task == "upscale":
        raise ConfigError(
            f"{model} is a model for task=upscale: predict takes classify and segment; score it with scalecv evaluate, "
            "or name it as upscale.model of another experiment"
        )
    is_dataset = bool(store.versions(source))
    opened = store.open_dataset(source, version) if is_dataset else None
    version = opened.version if opened else None
    job = Job(uri, source, version, to, batch, tile, overlap, probability, allow_import)
    key = _key(job, facts.weights_hash)
    storage.check_writable(to)
    _claim(to, key, facts)
    listed = _rows(opened, split, source) if opened else _files(source)
    there = _records(to)
    records: list[dict[str, Any]] = []
    pending: list[Chunk] = []
    for chunk in _named(listed, key):
        done = there.get(chunk["name"])
        records.append(done) if done else pending.append(chunk)
    skipped = sum(record["rows"] for record in records)
    total = skipped + sum(chunk["rows"] for chunk in pending)
    if not total and not records:
        raise DataError(f"no images in {storage.without_secrets(source)}: expected images, or a dataset")
    tell({"kind": "progress", "message": f"predicting {total - skipped:,} images with {facts.name} ({facts.task})"})
    if facts.task == "segment":
        tell({"kind": "progress", "message": f"scenes go through in {windows}"})
    for record in _run(job, pending, concurrency):
        records.append(record)
        tell({"kind": "progress", "done": sum(r["rows"] + len(r["quarantine"]) for r in records), "total": total})
    return _summary(job, facts, records, skipped)


def _key(job: Job, weights_hash: str) -> str:
    """What makes a prediction, but for the images."""
    shape = {"weights": weights_hash, **{k: v for k, v in asdict(job).items() if k not in ("bundle", "to", "batch")}}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def _claim(to: str, key: str, facts: bundle.Facts) -> None:
    """Say whose predictions lie here.

    Raises: DataError: those of another model, source or options.
    """
    where = storage.join(to, RECORDS, JOB)
    text = json.dumps({"key": key, "model": facts.name, "weights_hash": facts.weights_hash}).encode()
    if storage.put_if_absent(where, text):
        return
    found = json.loads(storage.get(where))
    if found["key"] != key:
        raise DataError(
            f"{storage.without_secrets(to)} holds predictions of another source or with other options or weights "
            f"(model {found['model']}): name a place that is empty"
        )


def _records(to: str) -> dict[str, dict[str, Any]]:
    """Records of finished chunks whose outputs are all there in full."""
    names = [n for n in storage.list_names(storage.join(to, RECORDS)) if n.endswith(".json") and n != JOB]
    if not names:
        return {}
    sizes = {entry.path: entry.size_bytes for entry in storage.list_entries(to)}
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda name: json.loads(storage.get(storage.join(to, RECORDS, name))), names)
        whole = [r for r in found if all(sizes.get(path) == size for path, size in r["outputs"])]
    return {record["name"]: record for record in whole}


def _files(source: str) -> Iterator[Chunk]:
    """Chunks of files of a folder, or one file."""
    entry = storage.head(source)
    if entry is not None:
        yield {"files": [["", entry.size_bytes, entry.etag]], "rows": 1, "size_bytes": entry.size_bytes}
        return
    held: list[list[Any]] = []
    size = 0
    for found in storage.list_entries(source):
        if not is_image(found.path):
            continue
        if held and (size + found.size_bytes > CHUNK_BYTES or len(held) >= CHUNK_FILES):
            yield {"files": held, "rows": len(held), "size_bytes": size}
            held, size = [], 0
        held.append([found.path, found.size_bytes, found.etag])
        size += found.size_bytes
    if held:
        yield {"files": held, "rows": len(held), "size_bytes": size}


def _rows(dataset: store.Dataset, split: str | None, where: str) -> Iterator[Chunk]:
    """Chunks of a dataset: its row groups."""
    known = dataset.manifest.splits
    if split is not None and not known.get(split):
        raise DataError(f"{where} has no split '{split}'{nearest(split, list(known))}; it has {', '.join(known)}")
    for number, shard in enumerate(dataset.manifest.shards):
        if split in (None, shard.split):
            for group, rows in enumerate(shard.row_groups):
                first, end = shard.byte_ranges[group]
                name = {"shard": number, "group": group, "sha256": shard.sha256}
                yield {**name, "rows": rows, "size_bytes": end - first}


def _named(chunks: Iterable[Chunk], key: str) -> Iterator[Chunk]:
    for chunk in chunks:
        yield {**chunk, "name": chunk_name(key, chunk.get("files") or [chunk["sha256"], chunk["group"]])}


def _run(job: Job, chunks: list[Chunk], concurrency: int | None) -> Iterator[dict[str, Any]]:
    """The records of chunks, in the order in which they end."""
    if not chunks:
        return
    is_small = sum(chunk["size_bytes"] for chunk in chunks) <= HERE_BYTES
    if concurrency == 0 or (concurrency is None and is_small and not runtime.is_at_hand()):
        worker = Worker(job)
        try:
            yield from map(worker, chunks)
        finally:
            worker.close()
        return
    from scalecv.serve.predict_ray import run

    for result in run(job, chunks, concurrency):
        if result["error"]:
            raise getattr(errors, result["error_type"], ScalecvError)(result["error"])
        yield json.loads(result["record"])


def _summary(job: Job, facts: bundle.Facts, records: list[dict[str, Any]], skipped: int) -> Result:
    aside = [bad for record in records for bad in record["quarantine"]]
    rows = sum(record["rows"] for record in records)
    if aside:
        _put_quarantine(job.to, aside)
    reasons = dict(Counter(bad["reason"] for bad in aside))
    if not rows:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        first = f"{aside[0]['path']} ({aside[0]['detail']})"
        raise ScalecvError(f"none of {len(aside)} images could be predicted: {told}, such as {first}")
    return Result(
        uri=storage.without_secrets(job.to),
        rows=rows,
        quarantined=len(aside),
        reasons=reasons,
        skipped=skipped,
        task=facts.task,
        model=storage.without_secrets(job.bundle),
        weights_hash=facts.weights_hash,
    )


def _put_quarantine(to: str, aside: list[dict[str, Any]]) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(sorted(aside, key=lambda bad: str(bad["path"]))), sink, compression="zstd")
    storage.put(storage.join(to, RECORDS, "quarantine.parquet"), sink.getvalue())
