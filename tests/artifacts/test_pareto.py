"""The front of recorded runs, by hand and over two real ones."""

import json
import struct
from dataclasses import replace

import pytest

from scalecv.artifacts import spool
from scalecv.artifacts.pareto import of_records, pareto
from scalecv.artifacts.record import Record
from scalecv.errors import UserError
from scalecv.tasks.task import is_cost
from tests.small import shapes, shapes_dataset

__all__ = ["shapes", "shapes_dataset"]


def run(name, cost, quality, device="cpu", cpu="one"):
    return Record(
        run_id=name,
        name=name,
        status="FINISHED",
        experiment={"task": "segment"},
        params={"model.parameters": str(cost)},
        data={},
        tags={"scalecv.device": device, "scalecv.worker_cpu": cpu},
        metrics={"val/iou": 0.0, "best/val/iou": quality, "val/loss": 1 - quality, "system/latency_p50_ms": cost / 10},
        curves={},
    )


RUNS = [
    run("large", 100, 0.9),
    run("small", 10, 0.7),
    run("waste", 60, 0.6),
    run("middle", 50, 0.8),
    run("twin", 50, 0.8),
]


@pytest.mark.parametrize(("x", "metric"), [("parameters", None), ("latency_ms", "val/iou"), ("parameters", "val/loss")])
def test_the_front_by_hand(x, metric):
    found = of_records(RUNS, x, metric)
    assert (found.points[0].name, found.points[-1].name) == ("small", "large")
    assert {one.name for one in found.points if one.is_front} == {"small", "middle", "twin", "large"}
    assert found.metric == (metric or "val/iou") and found.note == ""


def test_of_errors_and_losses_less_is_better():
    assert [is_cost(f"val/{name}") for name in ("loss", "calibration_error", "false_positives_per_tile", "iou")] == [
        True, True, True, False,
    ]  # fmt: skip


def test_measured_on_two_machines_is_said_and_what_is_missing_refused():
    assert "different machines: H200, one" in of_records([*RUNS, run("gpu", 1, 0.9, "H200")], "latency_ms").note
    for runs, x, metric, said in (
        (RUNS[:1], "parameters", None, "at least two runs"),
        (RUNS, "flops", None, "has not recorded model.flops"),
        (RUNS, "parameters", "val/iuo", "did you mean 'val/iou'"),
    ):
        with pytest.raises(UserError, match=said):
            of_records(runs, x, metric)


def test_a_sweep_is_no_run_and_its_trials_were_measured_beside_others():
    trials = [replace(one, tags=one.tags | {"scalecv.sweep": "key"}) for one in RUNS[:2]]
    assert "latency_ms of 2 trials was measured beside others" in of_records([*trials, *RUNS[2:]], "latency_ms").note
    assert of_records(trials, "parameters").note == ""
    sweep = replace(RUNS[0], tags=RUNS[0].tags | {"search.space.train.lr": "{}"}, metrics={})
    with pytest.raises(UserError, match="large is a sweep: name its trials, as large-0000"):
        of_records([sweep, *trials], "latency_ms")


def test_where_some_run_has_no_val_the_test_split_is_compared():
    scored = [replace(one, metrics=one.metrics | {"test/iou": one.metrics["best/val/iou"] / 2}) for one in RUNS]
    names = ("val/iou", "best/val/iou", "val/loss")
    without = replace(scored[0], metrics={k: v for k, v in scored[0].metrics.items() if k not in names})
    found = of_records([without, *scored[1:]], "parameters")
    assert found.metric == "test/iou" and [p.quality for p in found.points][-1] == 0.45
    assert of_records(scored, "parameters").metric == "val/iou"
    with pytest.raises(UserError, match=r"large\) has not recorded val/iou"):
        of_records([without, *scored[1:]], "parameters", "val/iou")


def test_two_recorded_runs_make_a_table_and_a_picture(shapes, tmp_path):
    from typer.testing import CliRunner

    from scalecv.cli.main import app
    from scalecv.train.run import train

    for name, width in (("narrow", 8), ("wide", 16)):
        train(shapes(name=name, train__epochs=1, model__args={"width": width}))
    said = CliRunner().invoke(app, ["pareto", "narrow", "wide", "--x", "parameters", "--to", str(tmp_path / "p.png")])
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    assert lines[0].split() == ["front", "name", "run", "parameters", "val/accuracy"]
    assert lines[1].startswith("*") and "narrow" in lines[1], "nothing is smaller"
    (state,) = (tmp_path / "runs/wide").rglob("*.sent.json")
    kept = json.loads(state.read_text())
    spool.append(kept["spool"], {"kind": "metrics", "step": 9, "metrics": {"val/accuracy": 0.5, "val/loss": 0.1}})
    waits = "2 points and other entries of run wide are not in MLflow yet: `scalecv sync runs` sends them"
    asked = ["pareto", "narrow", f"runs:/{kept['run_id']}", "--x"]
    late = CliRunner().invoke(app, [*asked, "parameters"])
    assert late.exit_code == 0 and waits in late.stderr and "narrow" not in late.stderr
    with pytest.raises(UserError, match=rf"has not recorded val/iou.*; {waits}"):
        pareto(["narrow", "wide"], "parameters", "val/iou", folders=["runs"])
    data = (tmp_path / "p.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", data[16:24])) > 300
