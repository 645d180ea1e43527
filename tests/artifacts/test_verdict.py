"""A verdict between recorded runs: real runs, real MLflow on SQLite, and the metrics that training told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from scalecv import storage
from scalecv.artifacts import scores
from scalecv.artifacts.record import read_record
from scalecv.artifacts.verdict import grouped, verdict
from scalecv.cli.main import app
from scalecv.errors import IntegrityError, UserError
from scalecv.metrics.pooled import metrics_of
from scalecv.serve.evaluate import evaluate
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.tasks.tell import metric_names
from scalecv.train.run import train
from tests import make
from tests.small import fields, fields_dataset, shapes, shapes_dataset

__all__ = ["fields", "fields_dataset", "shapes", "shapes_dataset"]


def of_rows(run_id, split, names):
    """Metrics from what the rows of a run add."""
    found = scores.read(run_id, split)
    measures = metrics_of(found.about.task, metric_names(found.about.classes))
    return {f"{split}/{n}": float(measures[n](np.asarray(scores.sums(found, n).sum(0), float))) for n in names}


def test_rows_give_the_metrics_of_training_and_seeds_make_one_configuration(shapes, shapes_dataset, tmp_path):
    keys = {"train__epochs": 1, "data__augment__rotate_deg": 0}
    slow = [train(shapes(name=f"slow-{seed}", seed=seed, train__lr=1e-5, **keys)) for seed in (0, 1)]
    fast = [train(shapes(name=f"fast-{seed}", seed=seed, train__lr=1e-2, **keys)) for seed in (0, 1)]
    names = [f"recall_{shape}" for shape in make.SHAPES] + ["accuracy", "macro_accuracy", "f1"]
    for split in ("val", "test"):
        told = {name: fast[0].metrics[name] for name in of_rows(fast[0].run_id, split, names)}
        assert of_rows(fast[0].run_id, split, names) == pytest.approx(told, abs=1e-12)
    again = evaluate(fast[0].bundle, shapes_dataset, split="test", to=str(tmp_path / "report"))
    assert again.metrics["test/accuracy"] == fast[0].metrics["test/accuracy"]
    tables = [pq.read_table(place / "scores/test.parquet") for place in (tmp_path / "report", Path(fast[0].run_uri))]
    assert tables[0].drop_columns("probability").equals(tables[1].drop_columns("probability"))
    about = json.loads(tables[1].schema.metadata[scores.ABOUT])
    assert about["fingerprint"] == again.fingerprint and about["split"] == "test" and about["rows"] == len(tables[1])

    runs = [*(one.run_id for one in slow), *(one.run_id for one in fast)]
    found = verdict([read_record(run) for run in runs])
    assert [(one.name, one.runs, one.seeds) for one in found.groups] == [
        ("slow-0", tuple(runs[:2]), (0, 1)), ("fast-0", tuple(runs[2:]), (0, 1))]  # fmt: skip
    assert found.groups[1].differs == ("train.lr 1e-05 → 0.01",)
    (pair,) = found.pairs
    means = [np.mean([one.metrics["val/accuracy"] for one in side]) for side in (slow, fast)]
    assert pair.effect.value == pytest.approx(means[1] - means[0]) and pair.effect.low < pair.effect.value
    assert "2 paired seeds" in pair.sentence and pair.effect.is_paired and "training noise" not in pair.sentence

    done = CliRunner().invoke(app, ["compare", "slow-0", "fast-0", "--chart", "apart.png"])
    assert done.exit_code == 0 and "one seed each" in done.stdout.splitlines()[0]
    assert "does not cover training noise" in done.stdout and "first difference of the inputs" in done.stdout
    assert storage.get(str(tmp_path / "apart.png")).startswith(b"\x89PNG")
    done = CliRunner().invoke(app, ["compare", *(f"runs:/{run}" for run in runs), "--metric", "test/f1"])
    assert done.exit_code == 0 and done.stdout.count("runs:/") == 4 and "test/f1" in done.stdout

    only_seed = verdict([read_record(run) for run in runs[:2]])
    assert only_seed.pairs == () and "they differ in seed alone" in only_seed.note
    with pytest.raises(UserError, match=r"on val/acuracy; did you mean 'accuracy'"):
        verdict([read_record(run) for run in runs], "val/acuracy")
    with pytest.raises(UserError, match="at least two runs"):
        CliRunner().invoke(app, ["compare", "slow-0"], catch_exceptions=False)

    make.shapes(tmp_path / "images", count=90, seed=3)
    where = {"source": str(tmp_path / "images"), "to": str(tmp_path / "data")}
    ingest(IngestOptions(**where, layout="imagefolder", concurrency=0))
    train(shapes(name="other", data__uri=str(tmp_path / "data"), **keys))
    said = CliRunner().invoke(app, ["compare", "slow-0", "other"])
    assert said.exit_code == 0 and said.stdout.startswith("no verdict: slow-0 and other scored data of another finger")
    assert "best/val/accuracy" in said.stdout, "what was recorded is told anyway"


def test_masks_are_kept_at_the_threshold_in_use(fields):
    run = train(fields(train__epochs=1, track__pictures=0))
    names = ["iou", "f1", "precision", "recall", "accuracy", "macro_accuracy"]
    assert run.metrics["val/threshold"] != 0.5
    assert of_rows(run.run_id, "val", names) == pytest.approx({f"val/{n}": run.metrics[f"val/{n}"] for n in names})
    record = read_record(run.run_id)
    made = MlflowClient(run.tracking_uri).create_run("0").info.run_id
    other = replace(record, run_id=made, name="other", experiment={**record.experiment, "seed": 9})
    assert [len(group) for group in grouped([record, other, record])] == [2]
    old = verdict([record, replace(other, experiment={**record.experiment, "train": {"lr": 1}})])
    assert old.pairs == () and "(other, FINISHED) recorded no scores/val.parquet" in old.note


def test_a_file_that_no_run_wrote_is_refused(fields):
    run = train(fields(train__epochs=1, track__pictures=0))
    MlflowClient(run.tracking_uri).log_text(run.run_id, "no parquet", "scores/val.parquet")
    with pytest.raises(IntegrityError, match=r"scores/val.parquet of run .* is not what a run writes"):
        scores.read(run.run_id, "val")
