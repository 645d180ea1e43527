"""`scores/SPLIT.parquet` of a run: what each row adds to the metrics, as written by the run and as read from MLflow.

| column | type | of |
|---|---|---|
| `id` | string | every task; ascending |
| `scene` | string or null | every task: what a tile is a window of |
| `label`, `prediction` | int32 | classify: places in the classes |
| `probability` | float | classify: of the label |
| `cells`, `counts` | list<int32> | segment: truth * K + prediction, and how many pixels, without zeros |
| `psnr`, `ssim` | double | upscale: NaN where the image has none |
| `pixels` | int32 | upscale: those with data |
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalecv import storage
from scalecv.artifacts import mlflow_client
from scalecv.errors import IntegrityError
from scalecv.tasks.rows import RowSums

FOLDER = "scores"
ABOUT = b"scalecv.scores"
MOST_BYTES = 1 << 30
"""No file that a run writes comes near it."""


@dataclass(frozen=True)
class About:
    """What the rows of a file are."""

    task: str
    split: str
    fingerprint: str
    """Of the dataset's version."""
    rows: int
    """Of the whole split; the file may hold a sample."""
    classes: tuple[str, ...]
    threshold: float
    """Probability from which on two classes were told as the second."""
    weights_hash: str
    format: int = 1


@dataclass(frozen=True)
class Scores:
    """A file that was read."""

    about: About
    ids: NDArray[np.str_]
    scenes: NDArray[Any] | None
    """The scene of each row, or its id; None where no row is a tile."""
    columns: Mapping[str, NDArray[Any]]


def write(rows: RowSums, about: About, to: str) -> str | None:
    """Write what was kept to TO/scores/SPLIT.parquet; its URI, or None where no row was kept. Called on all ranks.

    Only where `to` is not empty something is written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = rows.gathered()
    if not to or not found:
        return None
    scene = pa.array(found.pop("scene"), pa.string()).dictionary_encode()
    columns: dict[str, Any] = {"id": pa.array(found.pop("id").astype(str)), "scene": scene}
    if "cells" in found:
        ends = pa.array(np.concatenate([[0], np.cumsum(found.pop("cells"))]), pa.int32())
        columns["cells"] = pa.ListArray.from_arrays(ends, pa.array(found.pop("cell")))
        columns["counts"] = pa.ListArray.from_arrays(ends, pa.array(found.pop("count")))
    table = pa.table(columns | {name: pa.array(values) for name, values in found.items()})
    table = table.replace_schema_metadata({ABOUT: json.dumps(asdict(about))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    uri = storage.join(to, FOLDER, f"{about.split}.parquet")
    storage.put(uri, sink.getvalue().to_pybytes())
    return uri


def read(run_id: str, split: str, uri: str | None = None) -> Scores | None:
    """The file of a split that MLflow holds of a run; None where it holds none.

    Raises: IntegrityError: it is not what a run writes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    client, path = mlflow_client.client(mlflow_client.tracking_uri(uri)), f"{FOLDER}/{split}.parquet"
    there = {one.path: one.file_size for one in client.list_artifacts(run_id, FOLDER)}
    if path not in there:
        return None
    try:
        if there[path] is not None and there[path] > MOST_BYTES:
            raise ValueError(f"it has {there[path]:,} bytes")
        with tempfile.TemporaryDirectory() as folder:
            table = pq.read_table(client.download_artifacts(run_id, path, folder), memory_map=False)
        return _parsed(table)
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{path} of run {run_id} is not what a run writes: {error}") from None


def _parsed(table: Any) -> Scores:
    told = json.loads(table.schema.metadata[ABOUT])
    about = About(**{**told, "classes": tuple(told["classes"])})
    if about.format != 1:
        raise ValueError(f"format {about.format}, this version reads 1")
    ids = np.asarray(table["id"].to_numpy(), dtype=str)
    scenes = np.asarray(table["scene"].cast("string").to_numpy(), dtype=object)
    is_tile = np.array([scene is not None for scene in scenes], dtype=bool)
    columns: dict[str, NDArray[Any]] = {}
    for name in table.column_names[2:]:
        column = table[name].combine_chunks()
        if name in ("cells", "counts"):
            columns["of_row"] = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy())
            column = column.flatten()
        columns[name] = column.to_numpy()
    return Scores(about, ids, np.where(is_tile, scenes, ids).astype(str) if is_tile.any() else None, columns)


def sums(scores: Scores, metric: str) -> Any:
    """What each row adds to a metric, scipy.sparse [N, D] in the layout of `metrics.pooled`.

    Raises: IntegrityError: a class that is none of the file's.
    """
    from scipy import sparse

    columns, rows, k = scores.columns, len(scores.ids), len(scores.about.classes)
    if scores.about.task == "upscale":
        value = columns[metric.rpartition("/")[2]]
        has_value = np.isfinite(value)
        return sparse.csr_array(np.column_stack([np.where(has_value, value, 0.0), has_value]))
    if scores.about.task == "segment":
        row, cell, count = columns["of_row"], columns["cells"], columns["counts"]
    else:
        row, cell = np.arange(rows), columns["label"].astype(np.int64) * k + columns["prediction"]
        count = np.ones(rows)
    true, called = np.divmod(cell, k)
    hit = true == called
    place = np.concatenate([true[hit], k + true, 2 * k + called])
    try:
        values = np.concatenate([count[hit], count, count]).astype(np.float64)
        return sparse.csr_array((values, (np.concatenate([row[hit], row, row]), place)), shape=(rows, 3 * k))
    except ValueError as error:
        raise IntegrityError(f"{FOLDER}/{scores.about.split}.parquet: {error}") from None
