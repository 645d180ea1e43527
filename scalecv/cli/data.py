"""Verbs on datasets: ingest, data show, data verify."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from scalecv.cli.output import Json, Quiet, print_json
from scalecv.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Look at and check a dataset.")
Dataset = Annotated[str, typer.Argument(help="Dataset that scalecv ingest wrote.")]
Version = Annotated[int | None, typer.Option(help="Version of the dataset; the newest by default.")]


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
    tile: Annotated[int | None, typer.Option(help="Cut large rasters into windows of this side, in pixels.")] = None,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring windows share.")] = 0,
    split_by: Annotated[
        str | None, typer.Option(help="Kept together: scene (those that lie on each other), or block (with --tile).")
    ] = None,
    block: Annotated[str | None, typer.Option(help="Side of a block: pixels, as 4096, or map units, 2000map.")] = None,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="Leave out windows without a valid pixel.")] = False,
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
        split_folders=_pairs(split_folder or []),
        tile=tile,
        overlap=overlap,
        split_by=split_by,
        block=block,
        drop_empty=drop_empty,
        csv=csv,
        classes=tuple(name.strip() for name in classes.split(",")) if classes else (),
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
        print_json(asdict(result))
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


def _pairs(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if pair.partition("=")[2] not in ("train", "val", "test"):
            raise ConfigError(f"--split-folder {pair!r}: expected FOLDER=train, FOLDER=val or FOLDER=test")
    return dict(pair.partition("=")[::2] for pair in pairs)


def _integers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--mask-values {text!r}: expected whole numbers, as 0,1") from None


@app.command()
def show(
    dataset: Dataset,
    version: Version = None,
    picture: Annotated[str | None, typer.Option(help="PNG of samples to write.")] = None,
    augment: Annotated[
        str | None, typer.Option(metavar="EXPERIMENT", help="Samples as the experiment's augmentation changes them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Facts, classes, splits, bands and what was set aside; samples as a picture."""
    from scalecv.shards import show as facts
    from scalecv.shards.store import open_dataset

    opened = open_dataset(dataset, version)
    if augment and not picture:
        raise ConfigError("--augment EXPERIMENT needs --picture FILE.png, where the samples are drawn")
    written = _augmented(opened, augment, picture) if augment and picture else None
    written = facts.sample_grid(opened, picture) if picture and not augment else written
    if as_json:
        print_json(facts.facts_json(opened) | {"picture": str(written) if written else None})
        return
    facts.print_facts(opened)
    if written:
        sys.stderr.write(f"samples: {written}\n")


def _augmented(opened: Any, experiment: str, picture: str) -> str:
    from scalecv import config, storage
    from scalecv.tasks.preview import augmented_png

    storage.put(picture, augmented_png(opened, config.load(experiment)))
    return storage.absolute(picture)


@app.command()
def verify(dataset: Dataset, version: Version = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Read every shard and compare it with the hash it was written with."""
    from scalecv.display import Display
    from scalecv.shards.store import open_dataset
    from scalecv.shards.store import verify as check

    display = Display(quiet=quiet)
    opened = open_dataset(dataset, version)
    problems = check(opened, lambda done, total: display({"kind": "progress", "done": done, "total": total}))
    if as_json:
        print_json(
            {"dataset": dataset, "version": opened.version, "shards": len(opened.manifest.shards), "problems": problems}
        )
    for problem in problems:
        display.line(str(problem))
    if problems:
        raise typer.Exit(1)
    display.line(f"{dataset} version {opened.version}: {len(opened.manifest.shards)} shards are as they were written")
