"""Two recorded runs beside each other: real runs, real MLflow on SQLite."""

import subprocess
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from scalecv.artifacts.compare import compare_records
from scalecv.artifacts.provenance import run_facts
from scalecv.artifacts.record import read_record
from scalecv.cli.main import app
from scalecv.errors import UserError
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.train.run import train
from tests import make
from tests.small import shapes, shapes_dataset

__all__ = ["shapes", "shapes_dataset"]


def test_the_first_difference_is_named_and_all_are_listed(shapes, tmp_path):
    one = train(shapes(name="one", train__epochs=1))
    train(shapes(name="two", train__epochs=1, train__lr=0.01, data__augment__hflip=0.0, track__pictures=2))
    found = compare_records(read_record(f"runs:/{one.run_id}"), read_record("two"))
    assert (found.first.kind, found.first.key, found.first.a, found.first.b) == (
        "experiment", "data.augment.hflip", "0.5", "0.0")  # fmt: skip
    assert [d.key for d in found.differences] == ["data.augment.hflip", "train.lr"], "not its name, nor its pictures"
    assert found.order_equal is True and found.weights_equal is False
    assert found.parting.step == 1 and found.parting.curve == "train/batch_loss"
    assert {"test/accuracy", "best/val/accuracy"} <= set(found.metrics)
    assert not any(name.startswith(("system/", "time/")) for name in found.metrics)

    make.shapes(tmp_path / "images", count=60, seed=3)
    where = {"source": str(tmp_path / "images"), "to": str(tmp_path / "data")}
    ingest(IngestOptions(**where, layout="imagefolder", concurrency=0))
    train(shapes(name="three", train__epochs=1, train__lr=0.01, data__uri=str(tmp_path / "data")))
    found = compare_records(read_record("one"), read_record("three"))
    assert (found.first.kind, found.first.key) == ("data", "fingerprint")
    assert "train.lr" in [d.key for d in found.differences] and found.order_equal is False

    done = CliRunner().invoke(app, ["compare", "one", "two"])
    assert done.exit_code == 0
    assert "first difference of the inputs: experiment: data.augment.hflip 0.5 → 0.0" in done.stdout
    assert "order of rows  equal\nweights        different\ncurves         part at step 1 " in done.stdout
    with pytest.raises(UserError, match=r"no run named 'thre' .*did you mean 'three'"):
        read_record("thre")
    with pytest.raises(UserError, match=r"no MLflow experiment 'scalevc'; did you mean 'scalecv'"):
        read_record("two", "scalevc")


def test_order_of_kinds_and_what_is_not_recorded(shapes):
    run = read_record(train(shapes(train__epochs=1)).run_id)
    same = compare_records(run, run)
    assert same.first is None and same.differences == [] and same.parting is None and same.weights_equal

    def against(**tags):
        return compare_records(run, replace(run, tags={**run.tags, **tags}))

    changed = {"scalecv.threads": "7", "scalecv.version.torch": "1", "scalecv.code": "x"}
    assert [d.kind for d in against(**changed).differences] == ["code", "environment", "hardware"]
    assert str(against(**changed).first) == f"code {run.tags['scalecv.code']} → x"
    found = against(**{"scalecv.git.changes": "abc in a.py"})
    assert found.first is None, "the first run had no repository, so nothing is known"
    assert [(d.key, d.a, d.b) for d in found.differences] == [("git changes", None, "abc in a.py")]

    fewer_points = replace(
        run, experiment={**run.experiment, "track": {**run.experiment["track"], "log_every": 3}},
        curves={**run.curves, "train/batch_loss": {2: 9.0}},
    )  # fmt: skip
    assert compare_records(run, fewer_points).parting is None, "means over other steps are not compared"
    old = {key: value for key, value in run.experiment.items() if key != "loss"}
    assert compare_records(run, replace(run, experiment=old)).differences == [], "a default that was not written out"


def test_epochs_that_were_raised_later_are_a_difference(shapes):
    train(shapes(name="raised", train__epochs=1))
    train(shapes(name="raised", train__epochs=2))
    train(shapes(name="straight", train__epochs=2))
    found = compare_records(read_record("raised"), read_record("straight"))
    assert [str(d) for d in found.differences] == ["train.epochs in the beginning 1 → 2"]
    assert "scalecv.resumed_at" in found.a.tags and "scalecv.resumed_at" not in found.b.tags


def test_changes_of_a_repository_are_told_by_hash_and_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*words):
        about = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *about, *words], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git("add", "a.py")
    git("commit", "-qm", "first")
    assert run_facts()["scalecv.git.changes"] == "none"
    (tmp_path / "notes.txt").write_text("no module")
    assert run_facts()["scalecv.git.changes"] == "none"
    seen = set()
    for text in ("x = 2\n", "x = 3\n"):
        (tmp_path / "a.py").write_text(text)
        seen.add(run_facts()["scalecv.git.changes"])
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    for text in ("y = 1\n", "y = 2\n"):
        (tmp_path / "new.py").write_text(text)
        seen.add(run_facts()["scalecv.git.changes"])
    assert len(seen) == 4 and sum(text.endswith(" in a.py") for text in seen) == 2
    assert sum(text.endswith(" in a.py, new.py") for text in seen) == 2
