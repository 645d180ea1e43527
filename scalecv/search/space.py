"""From the space of an experiment to experiments: each trial's values depend on the seed and its number alone."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalecv.config import Experiment, Scalar, build, with_overrides
from scalecv.config.search import Spec
from scalecv.errors import ConfigError, UserError

TRIES = 100
"""Draws of one trial before the space is called empty."""


@dataclass(frozen=True)
class Drawn:
    """One point of the space."""

    overrides: dict[str, Scalar]
    left_out: tuple[str, ...]
    """Why earlier draws of this trial could not be used, one line each."""


def draw(base: Experiment, number: int, approve: Callable[[Experiment], object]) -> Drawn:
    """The values of one trial.

    Args:
        base: the experiment with its space.
        number: of the trial.
        approve: raises a UserError where an experiment cannot run.
    Raises: ConfigError: none of 100 draws gave an experiment that can run; the message has the last reason.
    """
    left_out: list[str] = []
    for attempt in range(TRIES):
        overrides = _values(base, number, attempt)
        try:
            approve(resolve(base, overrides))
        except UserError as error:
            left_out.append(f"{told(overrides)}: {str(error).splitlines()[0]}")
            continue
        return Drawn(overrides, tuple(dict.fromkeys(left_out)))
    raise ConfigError(f"none of {TRIES} draws of search.space can run, such as {left_out[-1]}")


def resolve(base: Experiment, overrides: dict[str, Scalar]) -> Experiment:
    """The experiment of a trial, checked like any other.

    Raises: ConfigError: it is none; the message names the key.
    """
    return build(with_overrides(base.model_dump(mode="json", exclude={"search"}), overrides), "search.space")


def told(overrides: dict[str, Scalar]) -> str:
    """Values of a trial in one line."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in overrides.items())


def _values(base: Experiment, number: int, attempt: int) -> dict[str, Scalar]:
    out: dict[str, Scalar] = {}
    for key, spec in base.search.space.items():
        if all(out.get(other) in allowed for other, allowed in spec.when.items()):
            digest = hashlib.sha256(f"{base.seed}|{number}|{attempt}|{key}".encode()).digest()
            out.update(_value(key, spec, np.random.default_rng(int.from_bytes(digest[:8], "little"))))
    return out


def _value(key: str, spec: Spec, rng: Any) -> dict[str, Scalar]:
    if spec.choice is not None:
        return {key: spec.choice[int(rng.integers(len(spec.choice)))]}
    if spec.int is not None:
        return {key: int(rng.integers(spec.int[0], spec.int[1] + 1))}
    if spec.simplex is not None:
        shares = rng.dirichlet(np.ones(len(spec.simplex)))
        return {f"{key}.{term}": float(f"{share:.6g}") for term, share in zip(spec.simplex, shares, strict=True)}
    low, high = spec.uniform or spec.loguniform or (0.0, 1.0)
    if spec.loguniform is not None:
        return {key: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.6g}")}
    return {key: float(f"{rng.uniform(low, high):.6g}")}
