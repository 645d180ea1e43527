"""`scalecv bench EXPERIMENT` measures its parts, `scalecv bench upscale EXPERIMENT` its images at 1, 2 and 4 times."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scalecv.cli.operations import tell_line
from scalecv.cli.output import Json, print_json

PARTS = "parts"
"""What is measured where nothing is named."""


class _PartsByDefault(TyperGroup):
    """Takes a word that is no verb of its own for an experiment."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, with the verb that was left out."""
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = [PARTS, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_PartsByDefault, no_args_is_help=True, help="Measure an experiment on this machine.")
File = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment file.")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set.")]


@app.command(PARTS)
def parts(
    experiment: File,
    overrides: Keys = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Seconds for each part.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Reading, decoding, the feed, the network, training; the word `parts` may be left out."""
    from scalecv import config

    resolved = config.load(experiment, config.parse_overrides(overrides or []))
    from scalecv.speed.parts import measure

    speeds = measure(resolved, seconds, tell=tell_line)
    if as_json:
        print_json(asdict(speeds))
        return
    for line in speeds.lines():
        sys.stdout.write(line + "\n")


@app.command("upscale")
def upscale(
    experiment: File,
    overrides: Keys = None,
    factors: Annotated[str, typer.Option(help="Some of 1,2,4; 1 is always measured.")] = "1,2,4",
    model: Annotated[str | None, typer.Option(help="Bundle or runs:/ID of task=upscale, measured besides.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all take their turn.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds of steps for each turn.")] = 5.0,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs to train each for its quality; 0 trains none.")] = 0,
    as_json: Json = False,
) -> None:
    """Cost, memory and quality of images enlarged before the network, bicubic and by a network."""
    from scalecv import config
    from scalecv.errors import ConfigError

    resolved = config.load(experiment, config.parse_overrides(overrides or []))
    words = {word.strip() for word in factors.split(",")}
    if not words <= {"1", "2", "4"}:
        raise ConfigError(f"--factors {factors}: expected some of 1,2,4, with commas between them")
    sides = sorted({1, *map(int, words)})
    from scalecv.speed.upscale import compare

    found = compare(resolved, sides, model=model, rounds=rounds, seconds=seconds, epochs=epochs, tell=tell_line)
    if as_json:
        print_json(asdict(found))
        return
    for line in found.lines():
        sys.stdout.write(line + "\n")
