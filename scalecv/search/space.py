"""From the space of an experiment to experiments."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalecv.config import Experiment, Scalar, build, with_overrides
from scalecv.config.search import Search, Spec
from scalecv.errors import ConfigError, UserError

_NONE = Search()
TRIES = 100
"""Draws of one trial before the space is called empty."""


@dataclass(frozen=True)
class Drawn:
    """One point of the space."""

    overrides: dict[str, Scalar]
    experiment: Experiment
    left_out: tuple[str, ...]
    """Why earlier draws of this trial could not be used, one line each."""


def draw(
    base: Experiment,
    number: int,
    approve: Callable[[Experiment], object],
    values: "Values | None" = None,
    tried: Collection[dict[str, Scalar]] = (),
) -> Drawn | None:
    """The values of one trial; None where 100 attempts gave nothing that was not tried before.

    Args:
        base: the experiment with its space.
        number: of the trial.
        approve: raises a UserError where an experiment cannot run.
        values: gives the values of the attempts, the first that can run is taken; None draws at random.
        tried: values that are passed over.
    Raises: ConfigError: none of 100 attempts gave an experiment that can run; the message has the last reason, and
        nothing else where it was always the same.
    """
    left_out: list[tuple[str, str]] = []  # values, and why they cannot run
    for attempt in range(TRIES):
        overrides = (values or at_random)(base, number, attempt)
        if overrides in tried:
            continue
        try:
            made = resolve(base, overrides)
            approve(made)
        except UserError as error:
            left_out.append((told(overrides), str(error).splitlines()[0]))
            continue
        return Drawn(overrides, made, tuple(f"{values}: {why}" for values, why in dict.fromkeys(left_out)))
    if len(left_out) < TRIES:
        return None
    last, reason = left_out[-1]
    if {why for _, why in left_out} == {reason}:  # no matter of what was drawn
        raise ConfigError(reason)
    raise ConfigError(f"none of {TRIES} draws of search.space can run, such as {last}: {reason}")


def check_choices(base: Experiment, approve: Callable[[Experiment], object]) -> None:
    """See that each value of a choice can be tried at all.

    Raises: ConfigError: one can run in no draw; the message has the last reason.
    """
    for key, spec in base.search.space.items():
        for value in spec.choice or ():
            why = _never(base, key, value, approve)
            if why:
                raise ConfigError(
                    f"search.space.{key}: {value!r} can run in no draw, such as {why}. Take it out; or mend the "
                    "experiment, whose values hold for keys of the space that are not set (`when`)"
                )


def _never(base: Experiment, key: str, value: Scalar, approve: Callable[[Experiment], object]) -> str:
    """Why no draw with a value of a choice can run; empty where one can, or where none has it."""
    only = base.search.space[key].model_copy(update={"choice": (value,)})
    search = base.search.model_copy(update={"space": {**base.search.space, key: only}})
    narrowed, why = base.model_copy(update={"search": search}), ""
    for attempt in range(TRIES):
        overrides = at_random(narrowed, 0, attempt)
        if key in overrides:
            try:
                approve(resolve(base, overrides))
                return ""
            except UserError as error:
                why = f"{told(overrides)}: {str(error).splitlines()[0]}"
    return why


def resolve(base: Experiment, overrides: dict[str, Scalar]) -> Experiment:
    """The experiment of a trial, checked like any other.

    Raises: ConfigError: it is none; the message names the key.
    """
    tree = with_overrides(base.model_dump(mode="json", exclude={"search"}), overrides)
    # Given, the default is not copied, which would take as long as all else.
    return build({"search": _NONE, **tree}, "search.space")


Values = Callable[[Experiment, int, int], dict[str, Scalar]]
"""(experiment, trial number, attempt) -> values"""


def grid(base: Experiment) -> Iterator[dict[str, Scalar]]:
    """Every combination of the choices, the last key changing first; keys whose `when` does not hold are not set."""
    keys = list(base.search.space)

    def below(place: int, out: dict[str, Scalar]) -> Iterator[dict[str, Scalar]]:
        if place == len(keys):
            yield dict(out)
            return
        key = keys[place]
        spec = base.search.space[key]
        if not is_set(spec, out):
            yield from below(place + 1, out)
            return
        for value in spec.choice or ():
            yield from below(place + 1, {**out, key: value})

    return below(0, {})


def generator(*what: object) -> np.random.Generator:
    """Random numbers that depend on what is given alone."""
    digest = hashlib.sha256("|".join(map(str, what)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def told(overrides: dict[str, Scalar]) -> str:
    """Values of a trial in one line."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in overrides.items())


def at_random(base: Experiment, number: int, attempt: int) -> dict[str, Scalar]:
    """Values that depend on seed, trial number and attempt alone."""
    out: dict[str, Scalar] = {}
    for key, spec in base.search.space.items():
        if is_set(spec, out):
            out.update(_value(key, spec, generator(base.seed, number, attempt, key)))
    return out


def is_set(spec: Spec, out: dict[str, Scalar]) -> bool:
    """Whether a key takes part, given the values before it."""
    return all(out.get(other) in allowed for other, allowed in spec.when.items())


def _value(key: str, spec: Spec, rng: Any) -> dict[str, Scalar]:
    if spec.choice is not None:
        return {key: spec.choice[int(rng.integers(len(spec.choice)))]}
    if spec.int is not None:
        return {key: int(rng.integers(spec.int[0], spec.int[1] + 1))}
    if spec.simplex is not None:
        shares = rng.dirichlet(np.ones(len(spec.simplex)))
        return mixture(key, spec.simplex, shares)
    low, high = spec.uniform or spec.loguniform or (0.0, 1.0)
    if spec.loguniform is not None:
        return {key: min(max(rounded(math.exp(rng.uniform(math.log(low), math.log(high)))), low), high)}
    return {key: min(max(rounded(rng.uniform(low, high)), low), high)}


def mixture(key: str, terms: tuple[str, ...], shares: Any) -> dict[str, Scalar]:
    """Weights of terms that add up to 1."""
    total = float(sum(shares))
    return {f"{key}.{term}": rounded(share / total) for term, share in zip(terms, shares, strict=True)}


def rounded(value: float) -> float:
    """To six digits, as people read it."""
    return float(f"{value:.6g}")
