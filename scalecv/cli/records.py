"""Verbs on recorded runs: reproduce, compare, pareto."""

import os
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from scalecv.cli.output import AllowImport, Json, Quiet, print_json

RunName = Annotated[str, typer.Argument(help="runs:/ID, or the name of a run.")]
Places = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Where it runs, as data.uri=s3://bucket/copy or scale.gpu=no."),
]
RunNames = Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="runs:/ID, or names of runs.")]
InExperiment = Annotated[str, typer.Option("--experiment", help="MLflow experiment in which names are looked up.")]


def reproduce(
    run: RunName,
    overrides: Places = None,
    to: Annotated[str | None, typer.Option(help="Name of the new run; NAME-reproduced by default.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Training processes; as recorded by default.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Start over under the new name.")] = False,
    allow_import: AllowImport = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recorded run again from what it logged: identical, within noise, or what differs and why."""
    from scalecv.config import parse_overrides
    from scalecv.display import Display
    from scalecv.train.reproduce import reproduce as run_again

    given = parse_overrides(overrides or [])
    if workers is not None:
        given["scale.workers"] = workers
    result = run_again(
        run,
        to=to,
        overrides=given,
        new=new,
        allow_import=allow_import,
        code_dirs=(os.getcwd(),) if allow_import else (),
        tell=Display(quiet=quiet),
    )
    if as_json:
        print_json({**asdict(result), "metrics": _beside(result.metrics, "recorded", "reproduced")})
    else:
        sys.stdout.write(f"{result.reason}\n")
        sys.stdout.write(f"recorded   runs:/{result.reproduced_run_id}\nreproduced runs:/{result.run_id}\n")
    if result.verdict == "differs":
        raise typer.Exit(1)


def compare(
    runs: RunNames,
    metric: Annotated[str | None, typer.Option(help="As test/iou; the task's own on val by default.")] = None,
    chart: Annotated[str | None, typer.Option(help="PNG file for the differences and their intervals.")] = None,
    experiment: InExperiment = "scalecv",
    as_json: Json = False,
) -> None:
    """Say whether runs differ in quality, and in which inputs; runs that differ in seed alone count as one."""
    from scalecv import storage
    from scalecv.artifacts.compare import compare_records
    from scalecv.artifacts.record import read_record
    from scalecv.artifacts.verdict import picture, verdict
    from scalecv.errors import UserError

    if len(runs) < 2:
        raise UserError("compare needs at least two runs: name each as runs:/ID or by its name")
    records = [read_record(run, experiment) for run in runs]
    found = verdict(records, metric)
    if chart:
        storage.put(storage.absolute(chart), picture(found))
    beside = compare_records(*records) if len(records) == 2 else None
    if as_json:
        print_json({**(_as_json(beside) if beside else {}), "verdict": asdict(found), "chart": chart})
        return
    lines = [pair.sentence for pair in found.pairs] + ([found.note] if found.note else [])
    lines += ["", *_lines(beside)] if beside else ["", *_groups(found, records)]
    for line in lines:
        sys.stdout.write(line + "\n")


def pareto(
    runs: RunNames,
    x: Annotated[
        str, typer.Option("--x", help="Cost: latency_ms, parameters, flops, peak_memory_mb or train_s.")
    ] = "latency_ms",
    metric: Annotated[str | None, typer.Option(help="As val/iou; the task's own on val by default.")] = None,
    to: Annotated[str | None, typer.Option(help="PNG file for the picture.")] = None,
    folder: Annotated[str, typer.Option(help="Where runs lie (track.storage), to see what waits for MLflow.")] = "runs",
    experiment: InExperiment = "scalecv",
    as_json: Json = False,
) -> None:
    """Quality of runs against what they cost: which are worth it, and which another one beats in both."""
    from scalecv import storage
    from scalecv.artifacts.pareto import pareto as find
    from scalecv.artifacts.pareto import picture
    from scalecv.train.runs import cache_folder

    found = find(runs, x, metric, experiment, (folder, cache_folder()))
    if to:
        storage.put(storage.absolute(to), picture(found))
    if as_json:
        print_json({**asdict(found), "picture": to})
        return
    rows = [
        ("*" if one.is_front else "", one.name, f"runs:/{one.run_id}", _number(one.cost), _number(one.quality))
        for one in found.points
    ]
    for line in _table([("front", "name", "run", found.x, found.metric), *rows]):
        sys.stdout.write(line + "\n")
    if found.note:
        sys.stderr.write(found.note + "\n")


def _as_json(found: Any) -> dict[str, Any]:
    """A comparison of two runs as `--json` has it."""
    return {
        "a": {"run_id": found.a.run_id, "name": found.a.name},
        "b": {"run_id": found.b.run_id, "name": found.b.name},
        "first_difference": asdict(found.first) if found.first else None,
        "differences": [asdict(one) for one in found.differences],
        "metrics": _beside(found.metrics, "a", "b"),
        "order_hash_equal": found.order_equal,
        "weights_hash_equal": found.weights_equal,
        "first_step": found.parting.step if found.parting else None,
        "parting": asdict(found.parting) if found.parting else None,
        "common_points": found.points,
    }


def _groups(found: Any, records: list[Any]) -> list[str]:
    """The configurations of a verdict, each run with its metric as it was recorded."""
    recorded = {one.run_id: one.metrics.get(f"best/{found.metric}", one.metrics.get(found.metric)) for one in records}
    rows = [
        (group.name, f"runs:/{run}", str(seed), _number(recorded[run]), "; ".join(group.differs))
        for group in found.groups
        for run, seed in zip(group.runs, group.seeds, strict=True)
    ]
    return _table([("configuration", "run", "seed", found.metric, "differs from the first in"), *rows])


def _lines(found: Any) -> list[str]:
    """A comparison as text."""
    first = f"{found.first.kind}: {found.first}" if found.first else "none that both runs recorded"
    words = {True: "equal", False: "different", None: "not recorded by both"}
    parting = f"equal at all {found.points} common points" if found.points else "have no point in common"
    if found.parting:
        one = found.parting
        parting = f"part at step {one.step} ({one.curve} {one.a:.9g} and {one.b:.9g})"
    rows = [(d.kind, d.key, d.a or "(not recorded)", d.b or "(not recorded)") for d in found.differences]
    scores = [
        (name, _number(x), _number(y), "" if x is None or y is None else f"{y - x:+.6g}")
        for name, (x, y) in found.metrics.items()
    ]
    return [
        f"a  runs:/{found.a.run_id}  {found.a.name}  {found.a.status}",
        f"b  runs:/{found.b.run_id}  {found.b.name}  {found.b.status}",
        f"first difference of the inputs: {first}",
        f"order of rows  {words[found.order_equal]}",
        f"weights        {words[found.weights_equal]}",
        f"curves         {parting}",
        *(["", *_table([("kind", "input", "a", "b"), *rows])] if rows else []),
        *(["", *_table([("metric", "a", "b", "b - a"), *scores])] if scores else []),
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns that line up; the last one is as wide as it is."""
    widths = [min(60, max(len(row[at]) for row in rows)) for at in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _beside(metrics: dict[str, tuple[float | None, float | None]], a: str, b: str) -> dict[str, dict[str, Any]]:
    return {name: {a: x, b: y, "delta": None if x is None or y is None else y - x} for name, (x, y) in metrics.items()}
