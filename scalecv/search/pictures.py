"""A sweep as pictures, PNG bytes each: what trials reached for their time, which values, which keys count, the race."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scalecv.config import Experiment, Scalar
from scalecv.search.report import Verdict, entrant_name
from scalecv.search.schedule import Plan, front_of
from scalecv.search.searchers import study_of
from scalecv.search.trials import Trial
from scalecv.tasks.charts import BLUE, GRID, INK, ORANGE, RED, figure, plain, png, short

FAINT = "#b8c7d6"
NAMED = 10
"""Trials that a picture names."""
LEARNED_FROM = 200
"""Last trials that importance looks at; more take minutes."""
KEYS = 12
"""Keys that a picture shows."""


def draw_all(
    plan: Plan, base: Experiment, metric: str, trials: Sequence[Trial], found: Verdict | None = None
) -> dict[str, bytes]:
    """Every picture that there is something to show on, by name.

    Args:
        plan: of the sweep.
        base: the experiment with its space.
        metric: the objective.
        trials: records of the search.
        found: the verdict, once there is one.
    """
    known = [one for one in trials if math.isfinite(one.value(plan.sign))]
    if not known:
        return {}
    pictures: dict[str, bytes | None] = {
        "rungs": rungs(plan, metric, known),
        "parallel_coordinates": parallel_coordinates(plan, metric, known),
        "cost_and_quality": cost_and_quality(plan, metric, known),
        "importance": importance(plan, base, metric, known),
        "race": race(metric, found) if found and found.pairs else None,
    }
    return {name: data for name, data in pictures.items() if data is not None}


def rungs(plan: Plan, metric: str, trials: Sequence[Trial]) -> bytes:
    """The objective of each trial over its device-seconds or epochs, and where the rungs are."""
    page = figure(7.6, 4.4)
    axes = page.subplots()
    best = max(trials, key=lambda one: one.value(plan.sign))
    for one in sorted(trials, key=lambda one: one is best):
        at = [point.device_s if plan.in_seconds else point.epoch for point in one.points]
        colour = ORANGE if one is best else BLUE if one.status == "finished" else FAINT
        width = 2.0 if one is best else 1.0
        axes.plot(at, [point.value for point in one.points], color=colour, linewidth=width, marker=".", markersize=4)
        if one.status != "finished":
            axes.plot(at[-1], one.points[-1].value, "x", color="#8a8a8a", markersize=5)
    furthest, place = max(axes.get_xlim()[1], plan.rung), 0
    while plan.search.scheduler != "none" and plan.level(place) < furthest and place < 20:
        axes.axvline(plan.level(place), color=GRID, linewidth=1.0, linestyle="--", zorder=0)
        place += 1
    axes.set_xscale("log" if furthest > 20 * plan.rung else "linear")
    axes.set_xlabel("device-seconds of training" if plan.in_seconds else "epochs", fontsize=9)
    axes.set_ylabel(metric, fontsize=9)
    ended = sum(one.status == "finished" for one in trials)
    title = f"{len(trials)} trials: {ended} trained to the end (blue), best trial {best.number} (orange), × paused"
    axes.set_title(title, fontsize=10, color=INK)
    plain(axes, "y")
    return png(page)


def parallel_coordinates(plan: Plan, metric: str, trials: Sequence[Trial]) -> bytes | None:
    """Each trial as a line through its values, the better the darker; None where no key differs."""
    keys = list(dict.fromkeys(key for one in trials for key in one.overrides))
    keys = [key for key in keys if len({str(one.overrides.get(key)) for one in trials}) > 1][:KEYS]
    if not keys:
        return None
    page = figure(max(5.0, 1.5 * len(keys) + 2.5), 4.4)
    axes = page.subplots()
    values = np.array([plan.sign * one.value(plan.sign) for one in trials])
    places = [_places(key, trials) for key in keys] + [_scaled(values.tolist(), log=False)]
    good = np.argsort(np.argsort(plan.sign * values)) / max(1, len(values) - 1)
    for row in np.argsort(good):
        heights = [place(row) for place, _ in places]
        best = good[row] == 1
        axes.plot(
            range(len(places)),
            heights,
            color=ORANGE if best else BLUE,
            alpha=1.0 if best else 0.1 + 0.6 * float(good[row]) ** 2,
            linewidth=2.0 if best else 1.0,
        )
    for at, (_, ticks) in enumerate(places):
        axes.axvline(at, color="#999999", linewidth=0.8, zorder=0)
        for height, label in ticks:
            axes.annotate(label, (at, height), (4, 0), textcoords="offset points", fontsize=7, va="center", color=INK)
    axes.set_xticks(range(len(places)), [*(short(key, 20) for key in keys), metric], fontsize=8, rotation=20)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(places) - 0.4)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return png(page)


def cost_and_quality(plan: Plan, metric: str, trials: Sequence[Trial]) -> bytes:
    """Quality of each trial against its cost (or device-seconds), the front joined."""
    page = figure(7.0, 4.4)
    axes = page.subplots()
    wanted = plan.search.cost
    shown = [one for one in trials if not wanted or one.cost is not None]
    costs = [one.cost or 0.0 if wanted else one.points[-1].device_s for one in shown]
    quality = [plan.sign * one.value(plan.sign) for one in shown]
    fronts = front_of(costs, [plan.sign * value for value in quality])
    front = sorted(at for at, place in enumerate(fronts) if place == 0)
    front.sort(key=lambda at: costs[at])
    axes.scatter(costs, quality, facecolors="white", edgecolors=BLUE, zorder=2)
    axes.step([costs[at] for at in front], [quality[at] for at in front], where="post", color=ORANGE, linewidth=1.2)
    axes.scatter([costs[at] for at in front], [quality[at] for at in front], color=ORANGE, zorder=3)
    for at in front[-NAMED:]:
        axes.annotate(str(shown[at].number), (costs[at], quality[at]), (4, 5), textcoords="offset points", fontsize=8)
    if costs and min(costs) > 0 and max(costs) > 20 * min(costs):
        axes.set_xscale("log")
    axes.set_xlabel(f"{wanted or 'device-seconds of training'} (less is better)", fontsize=9)
    axes.set_ylabel(metric, fontsize=9)
    axes.set_title("trials by cost and quality; the front is numbered", fontsize=10, color=INK)
    plain(axes, "y")
    return png(page)


def importance(plan: Plan, base: Experiment, metric: str, trials: Sequence[Trial]) -> bytes | None:
    """Share of the differences between trials that each key explains (fANOVA); None where that cannot be told."""
    keys = importances(plan, base, trials)
    if not keys:
        return None
    page = figure(6.4, 0.9 + 0.3 * len(keys))
    axes = page.subplots()
    names = list(keys)[:KEYS]
    axes.barh(range(len(names)), [keys[name] for name in names], color=BLUE, height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(f"importance for {metric}, over {len(trials)} trials as far as each came", fontsize=10, color=INK)
    plain(axes, "x")
    return png(page)


def importances(plan: Plan, base: Experiment, trials: Sequence[Trial]) -> dict[str, float]:
    """Importance of each key that all trials have, the highest first; empty where fewer than 4 trials say nothing."""
    import optuna

    ended = [one for one in trials if one.status != "failed"][-LEARNED_FROM:]
    if len(ended) < 4 or len({one.value(plan.sign) for one in ended}) < 2:
        return {}
    try:
        study = study_of(plan, base, ended, as_ended=True)
        of_quality: Callable[[Any], float] = lambda one: float(one.values[0])  # noqa: E731
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=base.seed)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, target=of_quality))
    except (ValueError, RuntimeError):  # every key is conditional, or has one value
        return {}


def race(metric: str, found: Verdict) -> bytes:
    """How far each entrant is behind the best of the race, with the interval of the difference."""
    page = figure(6.6, 1.0 + 0.4 * len(found.pairs))
    axes = page.subplots()
    for at, pair in enumerate(found.pairs):
        colour = RED if pair.is_told_apart else "#8a8a8a"
        axes.plot([-pair.high, -pair.low], [at, at], color=colour, linewidth=2.0, solid_capstyle="butt")
        axes.plot(-pair.effect, at, "o", color=colour)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(found.pairs)), [entrant_name(pair.other) for pair in found.pairs], fontsize=8)
    axes.set_ylim(len(found.pairs) - 0.5, -0.5)
    best = entrant_name(found.pairs[0].better)
    axes.set_xlabel(
        f"{metric}, difference to {best} and its simultaneous {100 * found.level:.4g} % interval", fontsize=9
    )
    axes.set_title(f"race over {found.seeds} new seeds; red is told apart", fontsize=10, color=INK)
    plain(axes, "x")
    return png(page)


Heights = tuple[Callable[[int], float], list[tuple[float, str]]]
"""(row -> height from 0 to 1, labels at heights)"""


def _places(key: str, trials: Sequence[Trial]) -> Heights:
    values = [one.overrides.get(key) for one in trials]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = [float(value) for value in values if value is not None]
        return _scaled(numbers, log=min(numbers) > 0 and max(numbers) > 20 * min(numbers))
    names = sorted({_text(value) for value in values})
    heights = {name: (at + 0.5) / len(names) for at, name in enumerate(names)}
    return lambda row: heights[_text(values[row])], [(height, short(name, 16)) for name, height in heights.items()]


def _scaled(numbers: Sequence[float], *, log: bool) -> Heights:
    at = np.log(numbers) if log else np.asarray(numbers, float)
    low, high = float(at.min()), float(at.max())
    height = lambda row: float((at[row] - low) / (high - low)) if high > low else 0.5  # noqa: E731
    ends = [(0.0, f"{min(numbers):.3g}"), (1.0, f"{max(numbers):.3g}")]
    return height, ends


def _text(value: Scalar) -> str:
    return "(not set)" if value is None else str(value)
