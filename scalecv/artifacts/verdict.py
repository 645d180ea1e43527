"""Whether recorded configurations differ: runs grouped by all but the seed, an effect for each pair, and a sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from scalecv.artifacts import scores
from scalecv.artifacts.compare import differences
from scalecv.artifacts.pareto import headline
from scalecv.artifacts.record import Record
from scalecv.errors import UserError, nearest
from scalecv.metrics.paired import LEAST_UNITS, LEVEL, Drawn, Effect, draw, effect, holm
from scalecv.metrics.pooled import metrics_of
from scalecv.tasks.charts import BLUE, GRID, INK, ORANGE, figure, png, short
from scalecv.tasks.tell import metric_names

INPUTS = ("data", "experiment")
"""Kinds of difference that make another configuration; the seed does not."""
ALONE = (
    "the interval is over images alone and does not cover training noise: another seed may say otherwise, so train "
    "each with three seeds or more"
)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration."""

    name: str
    """Of its first run, with the ID where another group has the same."""
    runs: tuple[str, ...]
    """IDs."""
    seeds: tuple[int, ...]
    """Of each run."""
    differs: tuple[str, ...]
    """In which inputs from the first group."""
    values: tuple[float, ...]
    """The metric of each run's rows; empty where there is no verdict."""


@dataclass(frozen=True)
class Pair:
    """Two configurations."""

    a: str
    b: str
    effect: Effect
    p_holm: float
    """Corrected for all pairs that were compared."""
    is_different: bool
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """What the rows that runs scored say of their difference."""

    metric: str
    images: int
    drawn: str
    """What was drawn with replacement, as in "512 images"."""
    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    note: str
    """Why there is no verdict, or what to keep in mind; empty if nothing."""


def verdict(records: Sequence[Record], metric: str | None = None, uri: str | None = None) -> Verdict:
    """Compare the configurations of recorded runs on the rows that all of them scored.

    Args:
        records: of trainings.
        metric: such as val/iou; None takes the headline of the task on val.
        uri: tracking URI; None takes the one in use.
    Raises: UserError: a metric that rows do not give.
    """
    wanted = metric or headline(records)
    split, _, name = wanted.partition("/")
    groups = grouped(records)
    order = [one for group in groups for one in group]
    found = [scores.read(one.run_id, split, uri) for one in order]
    known = [one for one in found if one is not None]
    if known:
        _check_metric(wanted, name, known[0].about)
    why = _unlike(order, found, split)
    if len(groups) == 1:
        why = f"the runs are of one configuration, they differ in seed alone; {why}".removesuffix("; ")
    if why:
        return Verdict(wanted, 0, "", tuple(_group(one, groups, []) for one in groups), (), f"no verdict: {why}")
    about, scenes = known[0].about, known[0].scenes
    is_few = scenes is not None and len(set(scenes.tolist())) < LEAST_UNITS
    drawn = draw(
        [scores.sums(one, name) for one in known],
        metrics_of(about.task, metric_names(about.classes))[name],
        scenes=None if scenes is None or is_few else np.unique(scenes, return_inverse=True)[1].tolist(),
    )
    said = _drawn(known[0])
    note = "too few scenes to draw: their tiles are taken as independent, which they are not" if is_few else ""
    ends = np.cumsum([len(group) for group in groups])
    places = [list(range(end - len(group), end)) for group, end in zip(groups, ends.tolist(), strict=True)]
    told = [_group(group, groups, drawn.whole[at].tolist()) for group, at in zip(groups, places, strict=True)]
    pairs = _pairs(wanted, said, told, places, drawn)
    return Verdict(wanted, len(known[0].ids), said, tuple(told), tuple(pairs), note)


def grouped(records: Sequence[Record]) -> list[list[Record]]:
    """Runs that differ only in seed together, in the order they came; a run that was named twice is there once."""
    groups: list[list[Record]] = []
    for one in {one.run_id: one for one in records}.values():
        home = next((group for group in groups if not _apart(group[0], one)), None)
        if home is None:
            groups.append([one])
        else:
            home.append(one)
    return groups


def picture(found: Verdict) -> bytes:
    """The effect of each pair and its interval as PNG; those that differ are filled.

    Raises: UserError: there is no verdict.
    """
    if not found.pairs:
        raise UserError(f"there is nothing to draw: {found.note}")
    page = figure(7.0, 1.2 + 0.42 * len(found.pairs))
    axes = page.subplots()
    for at, pair in enumerate(found.pairs):
        one, colour = pair.effect, ORANGE if pair.is_different else BLUE
        axes.plot([one.low, one.high], [at, at], color=colour, linewidth=2)
        axes.plot(one.value, at, "o", color=colour, markerfacecolor=colour if pair.is_different else "white")
    labels = [f"{short(pair.b)} - {short(pair.a)}" for pair in found.pairs]
    axes.set_yticks(range(len(labels)), labels, fontsize=9, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"difference of {found.metric}, {LEVEL:.0%} interval, {found.drawn}", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return png(page)


def _pairs(
    metric: str, said: str, groups: Sequence[Group], places: Sequence[Sequence[int]], drawn: Drawn
) -> list[Pair]:
    """Each pair of groups, with one correction over all of them."""
    chosen = list(combinations(range(len(groups)), 2))
    found = [effect(drawn, *(_seeds(groups[at], places[at]) for at in pair)) for pair in chosen]
    corrected, pairs = holm([one.p for one in found]), []
    for (a, b), one, p in zip(chosen, found, corrected, strict=True):
        is_different = p <= 1 - LEVEL
        names = groups[a].name, groups[b].name
        sentence = _sentence(*names, metric, said, one, p if len(chosen) > 1 else None, is_different=is_different)
        pairs.append(Pair(*names, one, p, is_different, sentence))
    return pairs


def _seeds(group: Group, places: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for seed, place in zip(group.seeds, places, strict=True):
        found.setdefault(seed, []).append(place)
    return found


def _sentence(a: str, b: str, metric: str, said: str, one: Effect, p_holm: float | None, *, is_different: bool) -> str:
    """A pair in words."""
    if one.detectable == 0:
        return f"no difference found: {a} and {b} score alike on all of {said}"
    most = math.inf if metric.endswith("psnr") else 1.0
    digits = max(3, 1 - math.floor(math.log10(one.detectable)))
    n = one.seeds[0] if one.is_paired else f"{one.seeds[0]} and {one.seeds[1]}"
    seeds = f"{n} {'paired ' if one.is_paired else ''}seeds" if one.covers_seeds else "one seed each"
    p = f"p {one.p:.2g}" + ("" if p_holm is None else f", {p_holm:.2g} by Holm over all pairs")
    if is_different:
        better, worse, low, high = (b, a, one.low, one.high) if one.value > 0 else (a, b, -one.high, -one.low)
        what, after = f"{better} is better than {worse} by {abs(one.value):.{digits}f} {metric}", ""
    else:
        low, high = one.low, one.high
        what = f"no difference found between {a} and {b}: {one.value:+.{digits}f} {metric}"
        after = f"; one of {one.detectable:.{digits}f} would have been found four times of five"
        if one.detectable > most:
            after = "; so few seeds or images show no difference at all, however large: add some"
    low, high = max(low, -most), min(high, most)
    interval = f"{LEVEL * 100:.0f} % {low:.{digits}f} to {high:.{digits}f}"
    return f"{what} ({interval}, {seeds}, {said}, {p}){after}" + ("" if one.covers_seeds else f"; {ALONE}")


def _group(group: Sequence[Record], groups: Sequence[Sequence[Record]], values: Sequence[float]) -> Group:
    first = group[0]
    is_unique = sum(other[0].name == first.name for other in groups) == 1
    return Group(
        name=first.name if is_unique else f"{first.name} ({first.run_id[:8]})",
        runs=tuple(one.run_id for one in group),
        seeds=tuple(int(one.experiment.get("seed", 0)) for one in group),
        differs=tuple(_apart(groups[0][0], first)),
        values=tuple(values),
    )


def _apart(a: Record, b: Record) -> list[str]:
    return [str(one) for one in differences(a, b) if one.kind in INPUTS and one.key != "seed"]


def _check_metric(wanted: str, name: str, about: scores.About) -> None:
    known = list(metrics_of(about.task, metric_names(about.classes)))
    if name not in known:
        raise UserError(
            f"no verdict can be given on {wanted}{nearest(name, known)}: what each row adds gives "
            f"{', '.join(f'{about.split}/{one}' for one in known[:12])}{' …' if len(known) > 12 else ''}"
        )


def _unlike(records: Sequence[Record], found: Sequence[scores.Scores | None], split: str) -> str:
    """In what the rows of two runs differ, so that these cannot be set against each other; empty if in nothing."""
    first = found[0]
    for record, one in zip(records, found, strict=True):
        if one is None:
            return (
                f"run {record.run_id} ({record.name}, {record.status}) recorded no {scores.FOLDER}/{split}.parquet; "
                "a run does so when it ends"
            )
        if first is None or one is first:
            continue
        pair = f"{records[0].name} and {record.name}"
        for what in ("task", "fingerprint", "classes"):
            ours, theirs = getattr(first.about, what), getattr(one.about, what)
            if ours != theirs:
                ours, theirs = (value[:12] if isinstance(value, str) else ", ".join(value) for value in (ours, theirs))
                kind = "data of another fingerprint" if what == "fingerprint" else f"other {what}"
                return f"{pair} scored {kind} ({ours} and {theirs})"
        if not np.array_equal(first.ids, one.ids):
            common = len(np.intersect1d(first.ids, one.ids))
            return f"{pair} scored other rows ({len(first.ids):,} and {len(one.ids):,}, {common:,} in common)"
    if first is not None and len(first.ids) < LEAST_UNITS:
        return f"{len(first.ids)} images of {split} are too few, at least {LEAST_UNITS} are needed"
    return ""


def _drawn(one: scores.Scores) -> str:
    of = f" of {one.about.rows:,}" if one.about.rows > len(one.ids) else ""
    if one.scenes is None:
        return f"{len(one.ids):,}{of} images"
    return f"{len(one.ids):,}{of} tiles of {len(set(one.scenes.tolist())):,} scenes"
