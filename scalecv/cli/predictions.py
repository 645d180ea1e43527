"""The verb predict."""

from dataclasses import asdict
from typing import Annotated

import typer

from scalecv.cli.output import AllowImport, Json, Quiet, print_json
from scalecv.errors import ConfigError


def predict(
    model: Annotated[str, typer.Argument(help="Bundle folder, runs:/ID or models:/NAME@ALIAS.")],
    source: Annotated[str, typer.Argument(help="Dataset, folder or bucket of images, or one image.")],
    to: Annotated[str, typer.Option(help="Where predictions go: a path or URI.")],
    split: Annotated[str | None, typer.Option(help="Split of a dataset; all of it by default.")] = None,
    version: Annotated[int | None, typer.Option(help="Version of a dataset; the newest by default.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images or windows at a time.")] = None,
    tile: Annotated[int | None, typer.Option(min=8, help="Side of the windows of a large scene, in pixels.")] = None,
    overlap: Annotated[int | None, typer.Option(min=0, help="Pixels that windows share; a quarter by default.")] = None,
    probability: Annotated[str | None, typer.Option(help="Also probabilities: float32, or uint8 (0 to 254).")] = None,
    concurrency: Annotated[int | None, typer.Option(min=0, help="Models at a time in Ray; 0 works here.")] = None,
    allow_import: AllowImport = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict images: a table of classes, or rasters with the georeference of the images."""
    from scalecv.display import Display
    from scalecv.serve.predict import predict as run

    if probability not in (None, "float32", "uint8"):
        raise ConfigError(f"--probability {probability}: expected float32 or uint8")
    display = Display(quiet=quiet)
    result = run(
        model,
        source,
        to,
        split=split,
        version=version,
        batch=batch,
        tile=tile,
        overlap=overlap,
        probability=probability,  # type: ignore[arg-type]  # looked at above
        concurrency=concurrency,
        allow_import=allow_import,
        tell=display,
    )
    if as_json:
        print_json(asdict(result))
        return
    done = f" ({result.skipped:,} were there already)" if result.skipped else ""
    display.line(f"{result.uri}: {result.rows:,} images predicted{done}")
    if result.quarantined:
        reasons = ", ".join(f"{reason} {rows}" for reason, rows in sorted(result.reasons.items()))
        display.line(f"set aside: {result.quarantined} ({reasons}); see _predict/quarantine.parquet there")
