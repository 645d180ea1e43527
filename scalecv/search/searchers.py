"""Where the values of a trial come from: by chance, from a grid, by Optuna, or from another trial of a population."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scalecv.config import Experiment, Scalar
from scalecv.config.search import Spec
from scalecv.errors import ConfigError, UserError
from scalecv.search.schedule import Plan
from scalecv.search.space import Values, at_random, generator, grid, is_set, mixture, resolve, rounded, told
from scalecv.search.trials import Trial

if TYPE_CHECKING:
    import optuna

GUIDED = 10
"""Attempts that ask Optuna, before chance is asked: it may love a corner in which nothing can run."""
FROM_CHANCE = 10
"""First trials of which Optuna learns."""
LIVING = ("train.lr.", "train.weight_decay.", "train.momentum.", "train.clip_norm.", "loss.", "data.augment.")
"""Beginnings of keys that may change while a network learns."""
CHANGE = (0.8, 1.25)


def values_of(plan: Plan, trials: Sequence[Trial], combinations: Sequence[dict[str, Scalar]] = ()) -> Values:
    """What proposes the values of the next trial, given all records, and the combinations of a grid."""
    if plan.search.searcher == "optuna":
        return lambda base, number, attempt: (
            _by_optuna(plan, base, trials, number, attempt) if attempt < GUIDED else at_random(base, number, attempt)
        )
    if plan.search.searcher == "grid":
        drawn = [one.overrides for one in trials]
        left = [values for values in combinations if values not in drawn] or combinations
        return lambda base, number, attempt: left[0]
    return at_random


def runnable(
    base: Experiment, approve: Callable[[Experiment], object], say: Callable[[str], None]
) -> list[dict[str, Scalar]]:
    """The first `search.trials` combinations of a grid that can run; `say` is told why others cannot."""
    out: list[dict[str, Scalar]] = []
    for values in grid(base):
        if len(out) == base.search.trials:
            break
        try:
            approve(resolve(base, values))
            out.append(values)
        except UserError as error:
            say(f"left out {told(values)}: {str(error).splitlines()[0]}")
    return out


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
        names = _names(key, spec)
        if not is_living(key) or names[0] not in out:
            continue
        if spec.simplex is not None:
            shares = [_number(out[name]) * rng.choice(CHANGE) for name in names]
            out.update(mixture(key, spec.simplex, shares))
        elif spec.choice is not None:
            at = spec.choice.index(out[key]) + int(rng.choice([-1, 1]))
            out[key] = spec.choice[min(max(at, 0), len(spec.choice) - 1)]
        else:
            low, high = spec.int or spec.uniform or spec.loguniform or (-math.inf, math.inf)
            before, factor = _number(out[key]), float(rng.choice(CHANGE))
            step = max(1, round(before * abs(factor - 1)))
            value = before + math.copysign(step, factor - 1) if spec.int else rounded(before * factor)
            value = min(max(value, low), high)
            out[key] = int(value) if spec.int else value
    return out


def written_keys(base: Experiment) -> list[str]:
    """Every key that a trial may set; each term of a mixture is one."""
    return [name for key, spec in base.search.space.items() for name in _names(key, spec)]


def _names(key: str, spec: Spec) -> list[str]:
    return [f"{key}.{term}" for term in spec.simplex] if spec.simplex else [key]


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
        if is_set(spec, out):
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
    low, high = spec.uniform or spec.loguniform or (-math.inf, math.inf)
    return {
        name: min(max(rounded(value), low), high) if isinstance(value, float) and spec.choice is None else value
        for name, value in given.items()
    }


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
