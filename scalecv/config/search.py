"""What `scalecv tune` looks for: keys of the experiment with the values they may take, and what it may cost."""

import builtins
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
    int: tuple[builtins.int, builtins.int] | None = None
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
        if self.int is not None and max(map(abs, self.int)) >= 1 << 63:
            raise ValueError(f"int needs numbers of 64 bits, found {list(self.int)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs numbers above 0, found {list(self.loguniform)}")
        return self


class Search(Frozen):
    """Many trials of one experiment; see `scalecv tune`."""

    space: dict[str, Spec] = {}
    """Dotted keys of the experiment, or `loss` with a simplex, and the values that each may take."""
    trials: int = Field(16, ge=1, le=100_000)
    """Most trials that are begun; with pbt, the population."""
    budget: str | None = None
    """Device-seconds of the whole sweep with its race, as 4h, 90m or 600s. Empty: as long as the trials take."""
    metric: str | None = None
    """What decides, as val/iou; empty takes train.metric, or the task's headline on val. Never a loss. Trials
    keep their best weights by it."""
    cost: Literal["latency_ms", "parameters", "flops"] | None = None
    """A second objective, less is better: the trials that are best for their cost go on, not those that are best."""
    searcher: Literal["random", "optuna", "grid"] = "random"
    """Where values come from. random: each trial alone; optuna: from what earlier trials reached (TPE); grid: every
    combination of choices, one after the other."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """Which trials go on from a rung. asha: the best of each (successive halving); hyperband: the same in brackets that
    begin at later rungs; median: those above the median of the rung; pbt: all, the worst quarter with weights and
    changed values of the best; none: trials do not pause."""
    rung: str | None = None
    """The first rung, as 2epochs or 30s of device-seconds. Empty: 1epochs. In device-seconds a network that is quick to
    train is ahead, whatever a slow one would reach in the end."""
    eta: int = Field(3, ge=2)
    """asha and hyperband: one of so many trials of a rung goes on; the next rung is so many times as far."""
    min_gain: float = Field(0.0, ge=0)
    """No trial begins once twice as many are expected to gain less than this in the metric; 0 begins all."""
    concurrent: int | None = Field(None, ge=1)
    """Most trials at a time; empty: as many as the cluster has room for."""
    finalists: int = Field(3, ge=0)
    """Best trials that are trained again, beside the experiment as written, on the same new seeds; 0: no race."""
    seeds: int = Field(5, ge=3)
    """Most seeds of the race; it begins with 3, and ends as soon as more could change nothing."""

    @field_validator("budget", mode="before")
    @classmethod
    def _time(cls, v: object) -> object:
        if v is not None and not (re.fullmatch(r"\d+(\.\d+)?[smhd]", str(v)) and float(str(v)[:-1])):
            raise ValueError(f"'{v}' is not a time: write 600s, 90m, 4h or 2d")
        return v

    @field_validator("rung")
    @classmethod
    def _rung(cls, v: str | None) -> str | None:
        if v is not None and not re.fullmatch(r"(?!0+(\.0+)?[a-z])\d+((\.\d+)?[smhd]|epochs)", v):
            raise ValueError(f"'{v}' is no rung: write 30s, 5m or 2epochs")
        return v

    @property
    def rung_s(self) -> float | None:
        """The first rung in device-seconds; None where it is in epochs, or not said."""
        return None if self.rung is None or self.rung.endswith("epochs") else _seconds(self.rung)

    @property
    def rung_epochs(self) -> int | None:
        """The first rung in epochs; None where it is in seconds, or not said."""
        return int(self.rung.removesuffix("epochs")) if self.rung and self.rung.endswith("epochs") else None

    @property
    def budget_s(self) -> float | None:
        """The budget in device-seconds."""
        return None if self.budget is None else _seconds(self.budget)

    @field_validator("metric")
    @classmethod
    def _no_loss(cls, v: str | None) -> str | None:
        if v is not None and v.split("/")[-1] == "loss":
            raise ValueError(f"{v} depends on the weights that are searched: name a metric, as val/iou or val/accuracy")
        return v

    @model_validator(mode="after")
    def _fits(self) -> "Search":
        if self.cost and self.scheduler == "pbt":
            raise ValueError("cost and pbt do not go together: pbt changes values that cost nothing")
        if self.searcher == "optuna" and self.scheduler == "pbt":
            raise ValueError("optuna and pbt do not go together: pbt itself says which values follow")
        for key, spec in self.space.items():
            if self.searcher == "grid" and spec.choice is None:
                raise ValueError(f"space.{key}: a grid is made of choices alone; give its values as choice")
            if spec.simplex is not None and key != "loss":
                raise ValueError(f"space.{key}: simplex is for loss, whose terms it weighs")
            if key.split(".")[0] in ("name", "task", "track", "scale", "search", "cache", "question"):
                raise ValueError(f"space.{key} does not change what is learned: leave it out of the space")
            if key in ("seed", "train.metric", "train.epochs", "data.uri", "data.version", "data.get"):
                raise ValueError(f"space.{key} would make trials that cannot be compared: leave it out of the space")
            if spec.simplex is not None and len({*spec.simplex}) < len(spec.simplex):
                raise ValueError(f"space.{key}: simplex names a term twice: {', '.join(spec.simplex)}")
            if any(f"{mixed}.{term}" == key for mixed, one in self.space.items() for term in one.simplex or ()):
                raise ValueError(f"space.{key} is a term of the simplex, which weighs it: leave one of the two out")
            for other in spec.when:
                if not spec.when[other]:
                    raise ValueError(f"space.{key}: when {other} has no value: name those with which the key is set")
                before = list(self.space)[: list(self.space).index(key)]
                known = self.space.get(other)
                if known is not None and known.choice is None and known.int is None:
                    raise ValueError(f"space.{key}: when names {other}, which is drawn from no choice or int")
                choices = known.choice if known else None
                unknown = [value for value in spec.when[other] if choices is not None and value not in choices]
                if unknown and other in before:
                    raise ValueError(
                        f"space.{key}: when {other} is {unknown[0]!r}, which is none of {list(choices or ())}"
                    )
                if other not in before:
                    raise ValueError(f"space.{key}: when names {other}, which must stand in the space before {key}")
        return self


def _seconds(time: str) -> float:
    return float(time[:-1]) * UNITS_S[time[-1]]
