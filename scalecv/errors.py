"""The errors that scalecv raises on purpose.

    ScalecvError            exit 1   failed while running
    ├── UserError           exit 2   the user's input is wrong; nothing was started
    │   ├── ConfigError              an experiment or command line that cannot be run
    │   ├── DataError                a source or dataset that is not what it should be
    │   └── StorageDenied            bucket missing, credentials refused, path not writable
    ├── StorageError        exit 1   storage failed for longer than its time budget
    ├── IntegrityError      exit 1   bytes are not those that were written
    └── Interrupted         exit 75  stopped on request, state saved: the same command goes on

Each message has four parts: what was found, where (uri, row, key), what was expected, what to do.
All of them take one string, so they survive pickling between processes.
"""

from difflib import get_close_matches


class ScalecvError(Exception):
    """Base of every error that scalecv raises on purpose."""

    exit_code = 1


class UserError(ScalecvError):
    """The user's input is wrong and nothing was started."""

    exit_code = 2


class ConfigError(UserError):
    """An experiment file, key or option that cannot be run."""


class DataError(UserError):
    """A source or dataset that is missing or not what it should be."""


class StorageDenied(UserError):
    """A location that does not exist or that these credentials may not use."""


class StorageError(ScalecvError):
    """Storage failed for longer than its time budget."""


class IntegrityError(ScalecvError):
    """Bytes differ from the size or hash that was recorded when they were written."""


class Interrupted(ScalecvError):
    """Stopped on request with the state saved; the same command goes on."""

    exit_code = 75


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """``"; did you mean 'x'?"`` for the known name closest to `name`, or an empty string."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
