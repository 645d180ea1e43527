"""The command line: `scalecv VERB … [key=value …]`. Each verb is one function of the library.

Progress and messages go to stderr; `--json` prints one JSON object on stdout as the last thing, and nothing else there.
Exit codes: 0 done, 1 failed while running, 2 the input is wrong and nothing was started, 75 interrupted, state saved.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from scalecv.errors import ConfigError, ScalecvError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Computer-vision experiments that outgrow one machine.\n\nFirst day:  scalecv demo  ·  "
    "scalecv ingest FOLDER --to data/mine  ·  scalecv train experiment.yaml",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at and check a dataset.")
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set, as train.lr=3e-4.")]
ExperimentPath = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment file, or runs:/ID.")]


def main() -> None:
    """Entry point: run a verb, turn errors of ours into one message and an exit code."""
    if "--json" in sys.argv:
        _keep_stdout_for_json()
    code = 0
    try:
        returned = app(standalone_mode=False)  # a typer.Exit comes back as its code
        code = returned if isinstance(returned, int) else 0
    except typer.Abort:
        code = 75
    except ScalecvError as error:
        code = _fail(error, error.exit_code)
    except KeyboardInterrupt:
        code = _fail("stopped", 75)
    except OSError as error:
        code = _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)
    except Exception as error:
        if type(error).__module__.startswith(("typer", "click")) and hasattr(error, "format_message"):
            code = _fail(f"{error.format_message()}. See scalecv --help", 2)
        else:
            raise
    sys.stderr.flush()
    sys.stdout.flush()
    sys.exit(code)


def _fail(message: object, code: int) -> int:
    sys.stderr.write(f"scalecv: {message}\n")
    return code


_json_out: Any = sys.stdout


def _keep_stdout_for_json() -> None:
    """Whatever else prints, in this process or a child, prints to stderr."""
    global _json_out
    _json_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def _print_json(value: Any) -> None:
    _json_out.write(json.dumps(value, default=str, allow_nan=True) + "\n")
    _json_out.flush()


def _experiment(path: str, overrides: list[str] | None) -> Any:
    from scalecv import config

    given = config.parse_overrides(overrides or [])
    if path.startswith("runs:/"):
        from scalecv.artifacts.tracking import resolved_experiment

        text = resolved_experiment(path.removeprefix("runs:/"))
        return config.build(config.with_overrides(config.parse_yaml(text, path), given), path)
    experiment = config.load(path, given)
    sys.path.insert(0, str(Path(path).resolve().parent))  # networks of the user's own stand beside the file
    return experiment


@app.command()
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
    result = run(resolved, new=new, code_dirs=code, tell=display)
    if as_json:
        _print_json(asdict(result))
    else:
        for line in _trained(result):
            display.line(line)


def _trained(result: Any) -> list[str]:
    scores = "  ".join(
        f"{name} {value:.4f}"
        for name, value in result.metrics.items()
        if name.split("/")[-1] in ("accuracy", "macro_accuracy", "iou", "f1")
    )
    first = "was complete already (raise train.epochs, or --new)" if result.was_complete else f"{result.status} after"
    return [
        f"{result.name}: {first} {result.epochs} epochs, best epoch {result.best_epoch}: {scores}",
        f"bundle    {result.bundle}",
        f"MLflow    run {result.run_id or '(not reached)'} in {result.tracking_uri}: scalecv ui",
    ]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Bundle folder, runs:/ID or models:/NAME@ALIAS.")],
    dataset: Annotated[str, typer.Argument(help="Dataset that scalecv ingest wrote.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    version: Annotated[int | None, typer.Option(help="Version of the dataset; the newest by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    to: Annotated[str | None, typer.Option(help="Folder for pictures and tables.")] = None,
    allow_import: Annotated[
        bool, typer.Option("--allow-import", help="Let the bundle import the network's own module.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model on every row of a split."""
    from scalecv.display import Display
    from scalecv.serve.evaluate import evaluate as run

    display = Display(quiet=quiet)
    sys.path.insert(0, os.getcwd())
    result = run(
        model, dataset, split=split, version=version, batch=batch, to=to, allow_import=allow_import, tell=display
    )
    if as_json:
        _print_json(asdict(result))
        return
    for name, value in result.metrics.items():
        sys.stdout.write(f"{name:32} {value:.4f}\n")
    if result.pictures:
        display.line(f"pictures  {result.pictures}/pictures/{split}")


@app.command()
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
        _print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        sys.stdout.write(f"{key:{width}}  {json.dumps(value):24}  {origin}\n")


@app.command()
def schema() -> None:
    """Print the JSON Schema of an experiment file, for editors."""
    from scalecv.config import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


@app.command()
def ingest(
    source: Annotated[str, typer.Argument(help="Folder or table: a path, s3://, gs:// or az:// URI.")],
    to: Annotated[str, typer.Option(help="Dataset to write: a path or URI.")],
    layout: Annotated[str, typer.Option(help="imagefolder, csv or masks.")],
    append: Annotated[bool, typer.Option("--append", help="Add what is new, as a new version.")] = False,
    group: Annotated[
        str | None, typer.Option(help="What a split keeps together: CSV column, or a regex with a group on the path.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Shares of train/val/test, as 80/10/10, where none is given.")
    ] = None,
    split_folder: Annotated[
        list[str] | None, typer.Option(help="A top folder that is a split by another name, as place_b=val.")
    ] = None,
    csv: Annotated[str | None, typer.Option(help="Name of the table in SOURCE (layout csv).")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names in the order of their numbers, a,b,c.")] = None,
    mask_values: Annotated[str | None, typer.Option(help="Values that masks may hold, as 0,1.")] = None,
    mask_ignore: Annotated[int | None, typer.Option(help="Value of mask pixels that count nowhere.")] = None,
    max_bad: Annotated[float, typer.Option(help="Largest share of images that may be set aside.")] = 0.05,
    shard_mb: Annotated[int, typer.Option(help="Size of a shard.")] = 128,
    row_group_mb: Annotated[float, typer.Option(help="Size of a row group, the unit of reading.")] = 4.0,
    concurrency: Annotated[int | None, typer.Option(help="Shards written at a time; all CPUs by default.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a source as a dataset: checked, hashed, split, with its facts."""
    from scalecv.display import IngestDisplay
    from scalecv.shards.ingest import IngestOptions
    from scalecv.shards.ingest import ingest as run

    options = _options(
        IngestOptions,
        source=source,
        to=to,
        layout=layout,
        append=append,
        group=group,
        split=split,
        split_folders=dict(pair.partition("=")[::2] for pair in split_folder or []),
        csv=csv,
        classes=tuple(classes.split(",")) if classes else (),
        mask_values=_integers(mask_values),
        mask_ignore=mask_ignore,
        max_bad=max_bad,
        shard_mb=shard_mb,
        row_group_mb=row_group_mb,
        concurrency=concurrency,
    )
    display = IngestDisplay(quiet=quiet)
    result = run(options, display)
    if as_json:
        _print_json(asdict(result))
        return
    for warning in result.warnings:
        display.line(f"note: {warning}")
    splits = ", ".join(f"{name} {rows:,}" for name, rows in result.splits.items())
    display.line(f"{result.dataset} version {result.version}: {result.rows:,} rows ({splits})")
    if result.quarantined:
        reasons = ", ".join(f"{reason} {rows}" for reason, rows in sorted(result.reasons.items()))
        display.line(f"set aside: {result.quarantined} ({reasons}); see scalecv data show {to}")


def _options(kind: Any, **given: Any) -> Any:
    """A record of options, or one line for each option that is wrong."""
    from pydantic import ValidationError

    try:
        return kind(**given)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = "--" + "-".join(str(part) for part in problem["loc"][:1]).replace("_", "-")
            said = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{name} {problem['input']!r}: {said[0].lower()}{said[1:]}")
        raise ConfigError("\n".join(lines)) from None


def _integers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--mask-values {text!r}: expected whole numbers, as 0,1") from None


Dataset = Annotated[str, typer.Argument(help="Dataset that scalecv ingest wrote.")]
Version = Annotated[int | None, typer.Option(help="Version of the dataset; the newest by default.")]


@data_app.command()
def show(
    dataset: Dataset,
    version: Version = None,
    picture: Annotated[str | None, typer.Option(help="PNG of samples to write.")] = None,
    as_json: Json = False,
) -> None:
    """Facts, classes, splits, bands and what was set aside; samples as a picture."""
    from scalecv.shards import show as facts
    from scalecv.shards.store import open_dataset

    opened = open_dataset(dataset, version)
    written = facts.sample_grid(opened, picture) if picture else None
    if as_json:
        _print_json(facts.facts_json(opened) | {"picture": str(written) if written else None})
        return
    facts.print_facts(opened)
    if written:
        sys.stderr.write(f"samples: {written}\n")


@data_app.command()
def verify(dataset: Dataset, version: Version = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Read every shard and compare it with the hash it was written with."""
    from scalecv.display import Display
    from scalecv.shards.store import open_dataset
    from scalecv.shards.store import verify as check

    display = Display(quiet=quiet)
    opened = open_dataset(dataset, version)
    problems = check(opened, lambda done, total: display({"kind": "progress", "done": done, "total": total}))
    if as_json:
        _print_json(
            {"dataset": dataset, "version": opened.version, "shards": len(opened.manifest.shards), "problems": problems}
        )
    for problem in problems:
        display.line(str(problem))
    if problems:
        raise typer.Exit(1)
    display.line(f"{dataset} version {opened.version}: {len(opened.manifest.shards)} shards are as they were written")


@app.command()
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
        _print_json(asdict(result))
        return
    display.line(
        f"\n{result.images:,} scans of digits became a dataset, a ResNet was trained on it, and {result.rows_scored} "
        f"held-back rows were scored: test accuracy {result.accuracy:.4f}\n"
        f"Pictures: {result.pictures}    Model: {result.bundle}\n"
        f"Look:     scalecv ui    Change: edit {result.folder}/experiment.yaml, then scalecv train "
        f"{result.folder}/experiment.yaml name=mine"
    )


@app.command()
def doctor(
    storage: Annotated[list[str] | None, typer.Argument(help="URIs to try to read and write.")] = None,
    as_json: Json = False,
) -> None:
    """Look at Ray, token, storage, disk, MLflow and GPU: one line each, and what to do."""
    from scalecv.doctor import checks

    found = checks(storage or [])
    if as_json:
        _print_json({"ok": all(c.ok is not False for c in found), "checks": [asdict(c) for c in found]})
    else:
        marks = {True: "ok  ", False: "BAD ", None: "note"}
        for check in found:
            sys.stdout.write(
                f"{marks[check.ok]}  {check.name:10} {check.found}{'  -> ' + check.do if check.do else ''}\n"
            )
    if any(check.ok is False for check in found):
        raise typer.Exit(1)


@app.command()
def sync(
    folder: Annotated[str, typer.Argument(help="Where runs lie (track.storage).")] = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow store; the one of each run by default.")] = None,
    as_json: Json = False,
) -> None:
    """Send what waits in the spools of runs to MLflow."""
    from scalecv.artifacts.tracking import sync as run
    from scalecv.train.runs import cache_folder

    done, waiting = (a + b for a, b in zip(run(folder, uri=uri), run(cache_folder(), uri=uri), strict=True))
    if as_json:
        _print_json({"sent": done, "waiting": waiting})
    else:
        sys.stderr.write(f"{done} runs are recorded, {waiting} still wait for MLflow\n")
    if waiting:
        raise typer.Exit(1)


@app.command()
def ui(
    uri: Annotated[
        str | None, typer.Option(help="MLflow store; MLFLOW_TRACKING_URI or ./mlruns.db by default.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen on another address without a login.")] = False,
) -> None:
    """Open the MLflow UI on the store in use, on this machine only."""
    from scalecv.ui import serve_ui

    raise typer.Exit(serve_ui(uri, host, port, insecure=insecure))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help="The verb to run there, with its arguments.")],
    address: Annotated[
        str | None, typer.Option(help="Job server, http://HOST:8265; RAY_API_SERVER_ADDRESS by default.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Stream the lines and wait for the end.")] = True,
    env: Annotated[list[str] | None, typer.Option(help="Name of a variable to hand on.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Accept a remote cluster without a token.")] = False,
) -> None:
    """Run the same command as a job of a Ray cluster."""
    from scalecv.submit import submit as run

    raise typer.Exit(
        run([verb, *context.args], address, follow=follow, env=env or [], insecure=insecure, out=_json_out)
    )
