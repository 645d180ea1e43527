"""The verb on a model's bands."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from scalecv.cli.output import AllowImport, Json, Quiet, print_json
from scalecv.errors import ConfigError


def bands(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL DATASET | [KEY=VALUE]...", help="Bundle, runs:/ID or models:/NAME@ALIAS; dataset."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    repeats: Annotated[int, typer.Option(min=1, help="Orders of the rows that are tried.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of these orders.")] = 0,
    batch: Annotated[int, typer.Option(min=2, help="Images at a time.")] = 64,
    to: Annotated[str | None, typer.Option(help="Folder for a chart.")] = None,
    drop: Annotated[
        str | None, typer.Option(metavar="EXPERIMENT", help="Train without each band in turn; KEY=VALUE set its keys.")
    ] = None,
    allow_import: AllowImport = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank the bands of a model by what its headline metric loses without them."""
    from scalecv.display import Display

    display = Display(quiet=quiet)
    given = what or []
    if drop:
        _drop(drop, given, display, as_json=as_json)
        return
    if len(given) != 2:
        raise ConfigError(f"scalecv bands takes MODEL and DATASET, or --drop EXPERIMENT; found {given or 'nothing'}")
    from scalecv.serve.bands import rank_bands

    found = rank_bands(
        *given,
        split=split,
        repeats=repeats,
        seed=seed,
        batch=batch,
        to=to,
        allow_import=allow_import,
        tell=display,
    )
    if as_json:
        print_json(asdict(found))
        return
    sys.stdout.write(f"{found.metric} {found.value:.4f} with all bands; lost where a band is\n")
    sys.stdout.write(f"{'':8}{f'of another row ({repeats} orders)':>30}{'at its mean':>14}\n")
    for one in found.bands:
        permuted = f"{one.permuted:+.4f} ± {one.permuted_se:.4f}"
        sys.stdout.write(f"{f'band {one.band}':8}{permuted:>30}{one.at_mean:>+14.4f}\n")
    if found.chart:
        display.line(f"chart  {found.chart}")


def _drop(path: str, overrides: list[str], display: Any, *, as_json: bool) -> None:
    from pathlib import Path

    from scalecv import config
    from scalecv.train.drop_bands import drop_bands

    experiment = config.load(path, config.parse_overrides(overrides))
    folder = str(Path(path).resolve().parent)
    sys.path.append(folder)
    metric, runs = drop_bands(experiment, code_dirs=(folder,), tell=display)
    if as_json:
        print_json({"metric": metric, "runs": [asdict(run) for run in runs]})
        return
    for run in runs:
        name = "all bands" if run.band is None else f"without {run.band}"
        lost = "" if run.band is None else f"  lost {run.lost:+.4f}"
        sys.stdout.write(f"{name:12}{metric} {run.value:.4f}{lost}  {run.name}\n")
