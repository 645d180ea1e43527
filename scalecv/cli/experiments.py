"""Verbs on experiments: demo, train, evaluate, config, schema."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from scalecv.cli.output import AllowImport, Json, Quiet, print_json

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set, as train.lr=3e-4.")]
ExperimentPath = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment file, or runs:/ID.")]


def _experiment(path: str, overrides: list[str] | None) -> Any:
    from scalecv import config

    given = config.parse_overrides(overrides or [])
    if path.startswith("runs:/"):
        from scalecv.artifacts.tracking import resolved_experiment

        text = resolved_experiment(path.removeprefix("runs:/"))
        return config.build(config.with_overrides(config.parse_yaml(text, path), given), path)
    experiment = config.load(path, given)
    sys.path.append(str(Path(path).resolve().parent))  # networks of the user's own stand beside the file
    return experiment


def _may_import(path: str, overrides: list[str] | None) -> bool:
    """A file and the command line may name code; a record of MLflow may not."""
    return not path.startswith("runs:/") or any(pair.startswith("model.arch=") for pair in overrides or [])


def train(
    experiment: ExperimentPath,
    overrides: Overrides = None,
    new: Annotated[bool, typer.Option("--new", help="Start over under the same name.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one experiment; the same command again continues it."""
    from scalecv.display import Display
    from scalecv.train.run import train as run

    resolved = _experiment(experiment, overrides)
    display = Display(quiet=quiet)
    code = () if experiment.startswith("runs:/") else (str(Path(experiment).resolve().parent),)
    result = run(resolved, new=new, code_dirs=code, allow_import=_may_import(experiment, overrides), tell=display)
    if as_json:
        print_json(asdict(result))
    else:
        for line in _trained(result):
            display.line(line)


def _trained(result: Any) -> list[str]:
    scores = "  ".join(
        f"{name} {value:.4f}"
        for name, value in result.metrics.items()
        if name.split("/")[-1] in ("iou", "f1", "average_precision", "threshold", "psnr", "bicubic_psnr", "ssim")
        or (name.split("/")[-1] in ("accuracy", "macro_accuracy") and f"{name.split('/')[0]}/iou" not in result.metrics)
    )
    epochs = f"{result.epochs} epoch{'s' if result.epochs != 1 else ''}"
    first = f"{result.status} after {epochs}"
    if result.was_complete:
        first = f"complete already after {epochs} (a larger train.epochs goes on, --new starts over)"
    return [
        f"{result.name}: {first}, best epoch {result.best_epoch}: {scores}",
        f"bundle    {result.bundle}",
        f"MLflow    run {result.run_id or '(not reached)'} in {result.tracking_uri}: scalecv ui",
    ]


def evaluate(
    model: Annotated[str, typer.Argument(help="Bundle folder, runs:/ID or models:/NAME@ALIAS.")],
    dataset: Annotated[str, typer.Argument(help="Dataset that scalecv ingest wrote.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    version: Annotated[int | None, typer.Option(help="Version of the dataset; the newest by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    to: Annotated[str | None, typer.Option(help="Folder for pictures and tables.")] = None,
    allow_import: AllowImport = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model on every row of a split."""
    from scalecv.display import Display
    from scalecv.serve.evaluate import evaluate as run

    display = Display(quiet=quiet)
    result = run(
        model, dataset, split=split, version=version, batch=batch, to=to, allow_import=allow_import, tell=display
    )
    if as_json:
        print_json(asdict(result))
        return
    for name, value in result.metrics.items():
        sys.stdout.write(f"{name:32} {value:.4f}\n")
    if result.pictures:
        display.line(f"pictures  {result.pictures}/pictures/{split}")


def config(
    experiment: ExperimentPath,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show the resolved experiment, and where each value comes from."""
    from scalecv import config as tree

    if experiment.startswith("runs:/"):
        rows = [
            (k, v, experiment)
            for k, v in tree.flatten(_experiment(experiment, overrides).model_dump(mode="json")).items()
        ]
    else:
        rows = list(tree.origins(experiment, tree.parse_overrides(overrides or [])))
    if as_json:
        print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        sys.stdout.write(f"{key:{width}}  {json.dumps(value):24}  {origin}\n")


def schema() -> None:
    """Print the JSON Schema of an experiment file, for editors."""
    from scalecv.config import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


def demo(
    folder: Annotated[str, typer.Option(help="Where everything is left.")] = "scalecv-demo",
    workers: Annotated[int, typer.Option(min=0, help="Training processes.")] = 2,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole way on small real images: ingest, train, evaluate, report."""
    from scalecv.demo import demo as run
    from scalecv.display import Display

    display = Display(quiet=quiet)
    result = run(folder, workers, tell=display)
    if as_json:
        print_json(asdict(result))
        return
    display.line(
        f"\n{result.images:,} scans of digits became a dataset, a ResNet was trained on it, and {result.rows_scored} "
        f"held-back rows were scored: test accuracy {result.accuracy:.4f}\n"
        f"Pictures: {result.pictures}    Model: {result.bundle}\n"
        f"Look:     scalecv ui    Change: edit {result.folder}/experiment.yaml, then scalecv train "
        f"{result.folder}/experiment.yaml name=mine"
    )
