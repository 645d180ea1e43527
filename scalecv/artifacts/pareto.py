"""`scalecv pareto`: which recorded runs are worth their cost, quality against size, time or memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scalecv.artifacts.record import Record, read_record
from scalecv.artifacts.sent import unsent
from scalecv.errors import UserError, nearest
from scalecv.tasks import TASKS
from scalecv.tasks.charts import BLUE, GRID, INK, ORANGE, figure, png, short
from scalecv.tasks.task import is_cost

COSTS = {
    "latency_ms": "system/latency_p50_ms",
    "parameters": "model.parameters",
    "flops": "model.flops",
    "peak_memory_mb": "system/peak_memory_mb",
    "train_s": "time/total_train_s",
}
"""Names of costs, and the metric or parameter that a run records each in."""
MEASURED = ("latency_ms", "peak_memory_mb", "train_s")
"""Costs that depend on the machine."""


@dataclass(frozen=True)
class Point:
    """A run as a place in the picture."""

    run_id: str
    name: str
    cost: float
    quality: float
    device: str
    is_front: bool
    """No other run is at least as good in both, and better in one."""


@dataclass(frozen=True)
class Pareto:
    """Runs by cost, cheapest first."""

    x: str
    """One of COSTS."""
    metric: str
    """Of the best weights where the run recorded that, as in best/val/iou."""
    larger_is_better: bool
    points: list[Point]
    note: str
    """What to keep in mind; empty if nothing."""


def pareto(
    runs: Sequence[str],
    x: str = "latency_ms",
    metric: str | None = None,
    experiment: str = "scalecv",
    folders: Sequence[str | Path] = (),
) -> Pareto:
    """Cost against quality of runs given as `runs:/ID` or by name, from what MLflow recorded.

    Args:
        runs: at least two.
        x: one of COSTS.
        metric: such as val/iou; None takes the headline of the task on val.
        experiment: MLflow experiment in which names are looked up.
        folders: where runs lie, of whose points some may still wait for MLflow: that is told.
    Raises: UserError: no such run, cost or metric, or one that a run did not record.
    """
    if x not in COSTS:
        raise UserError(f"--x {x}: expected one of {', '.join(COSTS)}{nearest(x, list(COSTS))}")
    waiting = _waiting(runs, folders)
    try:
        found = of_records([read_record(run, experiment) for run in dict.fromkeys(runs)], x, metric)
    except UserError as error:
        raise UserError("; ".join([str(error), *waiting])) from None
    return replace(found, note="; ".join([*([found.note] if found.note else []), *waiting]))


def _waiting(runs: Sequence[str], folders: Sequence[str | Path]) -> list[str]:
    """A line for each of the runs of which MLflow has not got everything yet."""
    named = {run.removeprefix("runs:/").partition("/")[0] for run in runs}
    return [
        f"{count} points and other entries of run {kept['run_name']} are not in MLflow yet: `scalecv sync {folder}` "
        "sends them"
        for folder in folders
        for _, kept, count in unsent(folder)
        if named & {kept["run_name"], kept["run_id"]}
    ]


def of_records(records: Sequence[Record], x: str, metric: str | None = None) -> Pareto:
    """Cost against quality of records.

    Raises: UserError: fewer than two runs, or one that did not record cost or metric.
    """
    if len(records) < 2:
        raise UserError("pareto needs at least two runs: name each as runs:/ID or by its name")
    metric = metric or headline(records)
    larger = not is_cost(metric)
    sign = 1 if larger else -1
    found = [(_cost(one, x), sign * _quality(one, metric), one) for one in records]
    places = [(cost, good) for cost, good, _ in found]
    points = [
        Point(
            run_id=one.run_id,
            name=one.name,
            cost=cost,
            quality=sign * good,
            device=_device(one),
            is_front=not any(_beats(other, (cost, good)) for other in places),
        )
        for cost, good, one in sorted(found, key=lambda at: (at[0], -at[1]))
    ]
    devices = sorted({point.device for point in points})
    differ = x in MEASURED and len(devices) > 1
    notes = [f"{x} was measured on different machines: {', '.join(devices)}"] if differ else []
    trials = sum("scalecv.sweep" in one.tags for one in records)
    if trials and x == "latency_ms":
        notes.append(f"{x} of {trials} trials was measured beside others of their sweep; --x parameters is exact")
    return Pareto(x, metric, larger, points, "; ".join(notes))


def picture(found: Pareto) -> bytes:
    """The points as PNG; those of the front are filled, named and joined."""
    page = figure(7.0, 4.6)
    axes = page.subplots()
    front = [point for point in found.points if point.is_front]
    rest = [point for point in found.points if not point.is_front]
    axes.step([p.cost for p in front], [p.quality for p in front], where="post", color=ORANGE, linewidth=1.2, zorder=2)
    axes.scatter([p.cost for p in front], [p.quality for p in front], color=ORANGE, zorder=3, label="front")
    axes.scatter([p.cost for p in rest], [p.quality for p in rest], facecolors="white", edgecolors=BLUE, zorder=3)
    for point in found.points:
        axes.annotate(short(point.name), (point.cost, point.quality), (4, 5), textcoords="offset points", fontsize=8)
    costs = [point.cost for point in found.points]
    if min(costs) > 0 and max(costs) > 20 * min(costs):
        axes.set_xscale("log")
    axes.margins(0.12)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{found.x} (less is better)", color=INK)
    axes.set_ylabel(f"{found.metric} ({'more' if found.larger_is_better else 'less'} is better)", color=INK)
    axes.set_title(f"{len(front)} of {len(found.points)} runs are on the front", fontsize=10, color=INK)
    return png(page)


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def _cost(record: Record, x: str) -> float:
    if any(tag.startswith("search.space.") for tag in record.tags):
        raise UserError(f"{record.name} is a sweep: name its trials, as {record.name}-0000")
    value = record.params.get(COSTS[x]) if COSTS[x].startswith("model.") else record.metrics.get(COSTS[x])
    if value is None or not math.isfinite(float(value)):
        raise UserError(
            f"run {record.run_id} ({record.name}, {record.status}) has not recorded {COSTS[x]}: let it train to its "
            "end, or take another --x"
        )
    return float(value)


def headline(records: Sequence[Record]) -> str:
    """The task's own metric: on val, or on test where some run has no val."""
    name = TASKS[str(records[0].experiment["task"])].headline
    return f"{'val' if all(f'val/{name}' in one.metrics for one in records) else 'test'}/{name}"


def _quality(record: Record, metric: str) -> float:
    value = record.metrics.get(f"best/{metric}", record.metrics.get(metric))
    if value is None or not math.isfinite(value):
        known = sorted(name for name in record.metrics if name.startswith(("val/", "test/")))
        raise UserError(
            f"run {record.run_id} ({record.name}) has not recorded {metric}{nearest(metric, known)}: it has "
            f"{', '.join(known) or 'no metric'}"
        )
    return value


def _device(record: Record) -> str:
    device = record.tags.get("scalecv.device", "unknown")
    return record.tags.get("scalecv.worker_cpu", device) if device == "cpu" else device
