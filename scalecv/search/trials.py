"""What is known of the trials of a sweep: plain records, from which every decision is computed."""

import math
from dataclasses import dataclass, field
from typing import Literal

from scalecv.config import Scalar

Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
"""Waiting: its segment was cut short, and goes on. Paused: at a rung, may be promoted; once the sweep is over it is
told as stopped."""


@dataclass(frozen=True)
class Point:
    """The objective after one epoch."""

    epoch: int
    """Epochs done, from 1."""
    value: float


@dataclass(frozen=True)
class Trial:
    """One sampled experiment, and how far it came."""

    number: int
    """From 0, in the order of sampling."""
    overrides: dict[str, Scalar]
    """Dotted keys of the experiment."""
    status: Status = "waiting"
    until: int | None = None
    """Epochs after which its segment pauses; None: it goes to the end."""
    device_s: float = 0.0
    """Device-seconds of all its segments."""
    points: tuple[Point, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """Of its last epoch, or of its end."""
    cause: str = ""
    """Why it failed or was stopped, one line."""
    run_id: str | None = None
    bundle: str = ""
    weights_hash: str = ""

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return max((point.epoch for point in self.points), default=0)

    def value(self, epochs: int, sign: float) -> float:
        """The best objective within the first epochs, times `sign`, so that larger is better; NaN is the worst."""
        within = (sign * point.value for point in self.points if point.epoch <= epochs)
        return max((value for value in within if math.isfinite(value)), default=float("-inf"))
