"""What is known of the trials of a sweep: plain records, from which every decision is computed."""

import math
from dataclasses import dataclass, field
from typing import Literal

from scalecv.config import Scalar

Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
"""Waiting: its segment was cut short, and goes on. Paused: at a rung, may be promoted; once the sweep is over it is
told as stopped."""

AS_WRITTEN = -1
"""Entrant of the race that is no trial: the experiment without values of its space."""


@dataclass(frozen=True)
class Point:
    """The objective after one epoch."""

    epoch: int
    """Epochs done, from 1."""
    value: float
    device_s: float = 0.0
    """Device-seconds of training and validation until then; those of its start are left out."""


@dataclass(frozen=True)
class Trial:
    """One sampled experiment, and how far it came."""

    number: int
    """From 0, in the order of sampling."""
    overrides: dict[str, Scalar]
    """Dotted keys of the experiment."""
    status: Status = "waiting"
    until: float | None = None
    """Rung at which its segment pauses, in the sweep's unit (device-seconds or epochs); None: it goes to the end."""
    device_s: float = 0.0
    """Device-seconds of all its segments."""
    points: tuple[Point, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """Of its last epoch, or of its end."""
    cost: float | None = None
    """The second objective, where there is one."""
    cause: str = ""
    """Why it failed or was stopped, one line."""
    run_id: str | None = None
    bundle: str = ""
    weights_hash: str = ""
    parent: int | None = None
    """Trial whose checkpoint it began with (pbt)."""
    born: float | None = None
    """Rung at which it did."""
    inherited: int = 0
    """Epochs in that checkpoint; its points begin after them."""
    replaces: int | None = None
    """Trial whose place in the population it takes (pbt)."""
    entrant: int | None = None
    """In the race: the trial that it trains again, or AS_WRITTEN."""
    seed: int | None = None
    """In the race: which of its seeds, from 0."""

    def run_name(self, sweep: str) -> str:
        """Of its run, by the name of its sweep."""
        if self.entrant is None:
            return f"{sweep[:80]}-{self.number:04d}"
        who = "as-written" if self.entrant == AS_WRITTEN else f"{self.entrant:04d}"
        return f"{sweep[:80]}-race-{who}-seed{self.seed}"

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return max((point.epoch for point in self.points), default=0)

    def value(self, sign: float, first: int | None = None) -> float:
        """The best objective of all or the first points, times `sign`, so that larger is better; NaN is the worst."""
        within = (sign * point.value for point in self.points[:first])
        return max((value for value in within if math.isfinite(value)), default=float("-inf"))
