"""Verbs on many runs of one experiment: tune, ensemble."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from scalecv.cli.experiments import ExperimentPath, Overrides, _experiment
from scalecv.cli.output import AllowImport, Json, Quiet, print_json
from scalecv.cli.records import InExperiment
from scalecv.errors import ConfigError


def tune(
    experiment: ExperimentPath,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search an experiment's space; the same command again continues it."""
    from scalecv.display import Display
    from scalecv.search.report import as_json as plain
    from scalecv.search.report import table
    from scalecv.search.sweep import tune as run

    if experiment.startswith("runs:/"):
        raise ConfigError(f"{experiment} is a record; tune searches the space of an experiment file")
    display = Display(quiet=quiet)
    code = (str(Path(experiment).resolve().parent),)
    swept = run(_experiment(experiment, overrides), code_dirs=code, tell=display)
    if as_json:
        print_json(plain(swept))
        return
    sys.stdout.write(table(swept.trials, swept.metric))
    if swept.best is not None:
        display.line(f"best      {swept.to_use}")
        display.line(f"bundle    {swept.best.bundle}")
    display.line(f"verdict   {swept.verdict.sentence}")
    display.line(f"report    {swept.report}")
    display.line(f"MLflow    run {swept.run_id or '(not reached)'} in {swept.tracking_uri}: scalecv ui")


def ensemble(
    latency_ms: Annotated[
        float, typer.Option(min=0.0, help="Most milliseconds of one image in all members together, on this machine.")
    ],
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Bundles, runs:/ID, models:/NAME@ALIAS or names of runs."),
    ] = None,
    from_sweep: Annotated[
        str | None,
        typer.Option(help="Experiment file, name or folder of a sweep: what it and its race trained to the end."),
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=64, help="Most members.")] = 5,
    to: Annotated[str | None, typer.Option(help="Name of the result; SWEEP-ensemble by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Dataset whose val split decides; that of training else.")] = None,
    metric: Annotated[str | None, typer.Option(help="As val/iou; the task's own by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    anyway: Annotated[bool, typer.Option("--anyway", help="Write it also where it is not better.")] = False,
    experiment: InExperiment = "scalecv",
    allow_import: AllowImport = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average trained models into one bundle, if that is better than the best of them alone."""
    from scalecv.display import Display
    from scalecv.search.ensemble import ensemble as run

    display = Display(quiet=quiet)
    found = run(
        runs or [],
        from_sweep=from_sweep,
        latency_ms=latency_ms,
        most=most,
        to=to,
        data=data,
        metric=metric,
        batch=batch,
        anyway=anyway,
        experiment=experiment,
        allow_import=allow_import,
        tell=display,
    )
    if as_json:
        print_json(asdict(found))
        return
    sys.stdout.write(f"{'weight':>8}{found.metric:>16}{'latency ms':>12}  member\n")
    for one in found.members:
        sys.stdout.write(f"{one.weight:>8.3f}{one.score:>16.4f}{one.latency_ms:>12.2f}  {one.name}\n")
    display.line(f"verdict   {found.verdict}")
    display.line(f"latency   {found.latency_ms:.2f} ms an image, all members together")
    if found.bundle:
        display.line(f"bundle    {found.bundle}")
    display.line(f"MLflow    run {found.run_id or '(not reached)'} in {found.tracking_uri}: scalecv ui")
