"""What is known of the trials of a sweep: plain records, from which every decision is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from scalecv.config import Scalar

Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Point:
    """The objective after one validation."""

    device_s: float
    """Device-seconds that the trial had spent by then, over all its segments."""
    epoch: int
    """Epochs done, from 1."""
    value: float


@dataclass(frozen=True)
class Trial:
    """One sampled experiment, and how far it came."""

    number: int
    """From 0, in the order of sampling; its random numbers depend on it and the sweep's seed alone."""
    overrides: dict[str, Scalar]
    """Dotted keys of the experiment, simplex weights among them."""
    status: Status = "waiting"
    device_s: float = 0.0
    points: tuple[Point, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last validation, and of the end."""
    cause: str = ""
    """Why it failed or was stopped, one line."""
    until: float | None = None
    """What its running segment was told; see `Job`."""
    parent: int | None = None
    """Trial whose weights it began with (PBT)."""
    run_id: str | None = None
    bundle: str = ""


@dataclass(frozen=True)
class Job:
    """What to run next: a segment of a trial, from where it stands."""

    trial: int
    """Number; one more than the last for a new trial."""
    overrides: dict[str, Scalar]
    until: float | None = None
    """Pause at the first validation at or after so much of the sweep's resource (see `Search.rungs`); None: to the end."""
    parent: int | None = None
    """Trial whose weights a new trial starts from (PBT)."""


class Strategy(Protocol):
    """Decides what runs next. A function of the records alone, so that a new driver decides as the old one would."""

    def next(self, trials: Sequence[Trial]) -> Job | None:
        """The next segment; None where nothing can start now. If nothing runs then, the sweep is over."""
        ...
