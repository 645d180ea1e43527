"""What `scalecv tune` looks for: keys of the experiment with the values they may take, and what it may cost."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from scalecv.config.frozen import Frozen, Scalar

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Spec(Frozen):
    """The values that one key may take; one of its keys is set."""

    choice: tuple[Scalar, ...] | None = Field(None, min_length=1)
    """One of these, each as likely as the others."""
    uniform: tuple[float, float] | None = None
    """A number between these two."""
    loguniform: tuple[float, float] | None = None
    """A number between these two, its logarithm uniform."""
    int: tuple[int, int] | None = None
    """A whole number from the first to the second."""
    simplex: tuple[str, ...] | None = Field(None, min_length=2)
    """For `loss`: terms whose weights are drawn so that they add up to 1."""
    when: dict[str, tuple[Scalar, ...]] = {}
    """Other keys of the space, and values of each for which this key is set at all."""

    @model_validator(mode="after")
    def _one(self) -> "Spec":
        ways = ("choice", "uniform", "loguniform", "int", "simplex")
        if sum(getattr(self, way) is not None for way in ways) != 1:
            raise ValueError(f"needs exactly one of {', '.join(ways)}")
        for way in ("uniform", "loguniform", "int"):
            ends = getattr(self, way)
            if ends is not None and not ends[0] < ends[1]:
                raise ValueError(f"{way} needs a smaller number before a larger one, found {list(ends)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs numbers above 0, found {list(self.loguniform)}")
        return self


class Search(Frozen):
    """Many trials of one experiment; see `scalecv tune`."""

    space: dict[str, Spec] = {}
    """Dotted keys of the experiment, or `loss` with a simplex, and the values that each may take."""
    trials: int = Field(16, ge=1, le=100_000)
    """Most trials that are begun."""
    budget: str | None = None
    """Device-seconds of all trials together, as 4h, 90m or 600s, after which no stretch of a trial begins; those under
    way go to their rung. Empty: as long as the trials take."""
    metric: str | None = None
    """What decides, as val/iou; empty takes train.metric, or the task's headline on val. Never a loss. Trials
    keep their best weights by it."""
    scheduler: Literal["promote", "none"] = "promote"
    """promote: trials pause at rungs, and the best of each rung go on (successive halving); none: each to its end."""
    rung_epochs: int = Field(1, ge=1)
    """Epochs to the first rung."""
    eta: int = Field(3, ge=2)
    """One of so many trials of a rung goes on; the next rung is so many times as far."""
    concurrent: int | None = Field(None, ge=1)
    """Most trials at a time; empty: as many as the cluster has room for."""

    @field_validator("budget", mode="before")
    @classmethod
    def _time(cls, v: object) -> object:
        if v is not None and not re.fullmatch(r"\d+(\.\d+)?[smhd]", str(v)):
            raise ValueError(f"'{v}' is not a time: write 600s, 90m, 4h or 2d")
        return v

    @property
    def budget_s(self) -> float | None:
        """The budget in device-seconds."""
        return None if self.budget is None else float(self.budget[:-1]) * UNITS_S[self.budget[-1]]

    @field_validator("metric")
    @classmethod
    def _no_loss(cls, v: str | None) -> str | None:
        if v is not None and v.split("/")[-1] == "loss":
            raise ValueError(f"{v} depends on the weights that are searched: name a metric, as val/iou or val/accuracy")
        return v

    @model_validator(mode="after")
    def _fits(self) -> "Search":
        for key, spec in self.space.items():
            if spec.simplex is not None and key != "loss":
                raise ValueError(f"space.{key}: simplex is for loss, whose terms it weighs")
            if key.split(".")[0] in ("name", "task", "track", "scale", "search", "cache", "question"):
                raise ValueError(f"space.{key} does not change what is learned: leave it out of the space")
            for other in spec.when:
                before = list(self.space)[: list(self.space).index(key)]
                if other not in before:
                    raise ValueError(f"space.{key}: when names {other}, which must stand in the space before {key}")
        return self
