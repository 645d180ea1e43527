"""Where a verb's result goes: JSON alone on stdout, everything else on stderr; and options that many verbs share."""

import json
import os
import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

_out: Any = sys.stdout
_printed = False


def keep_stdout_for_json() -> None:
    """Whatever else prints, in this process or a child, prints to stderr."""
    global _out
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def json_stream() -> Any:
    """The real stdout."""
    return _out


def has_printed() -> bool:
    """Whether a verb gave its JSON object already (a submitted job gives its own)."""
    return _printed or "submit" in sys.argv[1:2]


def print_json(value: Any) -> None:
    """The one JSON object of a verb."""
    global _printed
    _printed = True
    _out.write(json.dumps(value, default=str, allow_nan=True) + "\n")
    _out.flush()
