"""Where a verb's result goes: JSON alone on stdout, everything else on stderr; and options that many verbs share."""

import json
import os
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from scalecv import redact

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def _look_here(allowed: bool) -> bool:
    """Where networks may be imported, they are looked for in the current folder too."""
    if allowed:
        sys.path.append(os.getcwd())
    return allowed


AllowImport = Annotated[
    bool,
    typer.Option("--allow-import", help="Let the model or record import its network's module.", callback=_look_here),
]

_out: Any = sys.stdout
_printed = False


class _Cleaned:
    """A stream that no secret passes: messages, log lines and tracebacks of any library."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without secrets."""
        return int(self._stream.write(redact.clean(text)))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line without secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def clean_streams() -> None:
    """From here on, what this process prints holds no secret."""
    global _out
    sys.stdout, sys.stderr, _out = _Cleaned(sys.stdout), _Cleaned(sys.stderr), _Cleaned(_out)


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
    _out.write(json.dumps(redact.clean_tree(value), default=str, allow_nan=True) + "\n")
    _out.flush()
