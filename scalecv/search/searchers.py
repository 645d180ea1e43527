"""Where the values of a trial come from: by chance, from a grid, by Optuna, or from another trial of a population."""

import math
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from scalecv.config import Experiment, Scalar
from scalecv.config.search import Spec
from scalecv.errors import ConfigError
from scalecv.search.schedule import Plan
from scalecv.search.space import Values, at_random, generator, grid, mixture, rounded
from scalecv.search.trials import Trial

if TYPE_CHECKING:
    import optuna

GUIDED = 10
"""Attempts that ask Optuna, before chance is asked: it may love a corner in which nothing can run."""
FROM_CHANCE = 10
"""First trials of which Optuna learns."""
LIVING = ("train.lr", "train.weight_decay", "train.momentum", "train.clip_norm", "loss.", "data.augment.")
"""Beginnings of keys that may change while a network learns."""
CHANGE = (0.8, 1.25)


def values_of(plan: Plan, trials: Sequence[Trial]) -> Values:
    """What proposes the values of the next trial, given all records."""
    if plan.search.searcher == "optuna":
        return lambda base, number, attempt: (
            _by_optuna(plan, base, trials, number, attempt) if attempt < GUIDED else at_random(base, number, attempt)
        )
    if plan.search.searcher == "grid":
        return lambda base, number, attempt: next(islice(grid(base), number, None))
    return at_random


def grid_size(base: Experiment, most: int) -> int:
    """How many of at most so many trials a grid has."""
    return sum(1 for _ in islice(grid(base), most))


def study_of(plan: Plan, base: Experiment, trials: Sequence[Trial], *, as_ended: bool = False) -> "optuna.Study":
    """The records as a study of Optuna, in memory.

    A paused trial is a pruned one with intermediate values; with `as_ended` all that have an objective are complete.
    """
    import optuna

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    down, up = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    directions = [up if plan.sign > 0 else down, *([down] if plan.search.cost else [])]
    study = optuna.create_study(directions=directions)
    study.add_trials([_frozen(plan, base, one, as_ended) for one in trials])
    return study


def perturbed(base: Experiment, child: Trial) -> dict[str, Scalar]:
    """Values of the parent, those that may change while a network learns times 0.8 or 1.25, within the space."""
    out = dict(child.overrides)
    for key, spec in base.search.space.items():
        rng = generator(base.seed, child.number, "perturbed", key)
        if not is_living(key):
            continue
        if spec.simplex is not None:
            shares = [_number(out[f"{key}.{term}"]) * rng.choice(CHANGE) for term in spec.simplex]
            out.update(mixture(key, spec.simplex, shares))
        elif key in out and spec.choice is not None:
            at = spec.choice.index(out[key]) + int(rng.choice([-1, 1]))
            out[key] = spec.choice[min(max(at, 0), len(spec.choice) - 1)]
        elif key in out:
            low, high = spec.int or spec.uniform or spec.loguniform or (-math.inf, math.inf)
            value = min(max(_number(out[key]) * float(rng.choice(CHANGE)), low), high)
            out[key] = round(value) if spec.int else rounded(value)
    return out


def is_living(key: str) -> bool:
    """Whether a key may change while a network learns."""
    return f"{key}.".startswith(LIVING)


def check_living(base: Experiment) -> None:
    """Raises: ConfigError: a population has nothing to change."""
    if not any(is_living(key) for key in base.search.space):
        raise ConfigError(
            "search.scheduler=pbt changes values of networks that learn, and search.space has none that may: add "
            "train.lr, train.weight_decay, loss or data.augment, or take another scheduler"
        )


def _by_optuna(plan: Plan, base: Experiment, trials: Sequence[Trial], number: int, attempt: int) -> dict[str, Scalar]:
    import optuna

    seed = int(generator(base.seed, number, attempt).integers(2**31))
    study = study_of(plan, base, trials)
    study.sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=FROM_CHANCE, multivariate=True, group=True, constant_liar=True
    )
    trial, out = study.ask(), dict[str, Scalar]()
    for key, spec in base.search.space.items():
        if all(out.get(other) in allowed for other, allowed in spec.when.items()):
            given = {name: _suggest(trial, name, kind) for name, kind in distributions(key, spec).items()}
            out.update(_values(key, spec, given))
    return out


def _suggest(trial: Any, name: str, kind: Any) -> Any:
    import optuna

    if isinstance(kind, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, kind.choices)
    if isinstance(kind, optuna.distributions.IntDistribution):
        return trial.suggest_int(name, kind.low, kind.high)
    return trial.suggest_float(name, kind.low, kind.high, log=kind.log)


def distributions(key: str, spec: Spec) -> dict[str, Any]:
    """A key of the space as distributions of Optuna, one for each term of a simplex."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if spec.choice is not None:
        return {key: CategoricalDistribution(spec.choice)}
    if spec.int is not None:
        return {key: IntDistribution(*spec.int)}
    if spec.simplex is not None:
        return {f"{key}.{term}": FloatDistribution(0.0, 1.0) for term in spec.simplex}
    low, high = spec.uniform or spec.loguniform or (0.0, 1.0)
    return {key: FloatDistribution(low, high, log=spec.loguniform is not None)}


def _values(key: str, spec: Spec, given: dict[str, Any]) -> dict[str, Scalar]:
    if spec.simplex is not None:
        # -log of uniform numbers is exponential: the shares are uniform on the simplex.
        return mixture(key, spec.simplex, [-math.log(max(value, 1e-9)) + 1e-9 for value in given.values()])
    return {name: rounded(value) if isinstance(value, float) else value for name, value in given.items()}


def _frozen(plan: Plan, base: Experiment, trial: Trial, as_ended: bool) -> Any:
    import optuna
    from optuna.trial import TrialState

    kinds, params = dict[str, Any](), dict[str, Any]()
    for key, spec in base.search.space.items():
        for name, kind in distributions(key, spec).items():
            if name in trial.overrides:
                value = trial.overrides[name]
                # Of exponential numbers only the shares are known; with a sum of as many as there are, each is usual.
                params[name] = math.exp(-_number(value) * len(spec.simplex)) if spec.simplex else value
                kinds[name] = kind
    known = plan.sign * trial.value(plan.sign)
    reached = [known, *([math.nan if trial.cost is None else trial.cost] if plan.search.cost else [])]
    has_all = all(map(math.isfinite, reached))
    if trial.status == "failed":
        state = TrialState.FAIL
    elif has_all and (as_ended or trial.status == "finished" or plan.search.cost):
        state = TrialState.COMPLETE  # of two objectives none is pruned
    elif has_all:
        state = TrialState.PRUNED
    else:
        state = TrialState.RUNNING
    steps = {} if plan.search.cost else {one.epoch: one.value for one in trial.points if math.isfinite(one.value)}
    return optuna.trial.create_trial(
        state=state,
        values=reached if state == TrialState.COMPLETE else None,
        params=params,
        distributions=kinds,
        intermediate_values=steps,
    )


def _number(value: Scalar) -> float:
    return float(value or 0)
