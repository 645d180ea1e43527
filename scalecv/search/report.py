"""How a sweep stands: as a verdict, as a table, as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scalecv.config.search import Search
from scalecv.search.race import Pair, Standing
from scalecv.search.schedule import Plan, best_of
from scalecv.search.space import told
from scalecv.search.trials import AS_WRITTEN, Trial


@dataclass(frozen=True)
class Verdict:
    """What the figures allow to say."""

    sentence: str
    winner: int | None = None
    """Trial that is better than the experiment as written, AS_WRITTEN if that is better than each trial; None:
    neither was found."""
    pairs: tuple[Pair, ...] = ()
    """Differences from the best of the race."""
    means: dict[int, float] | None = None
    """Mean objective of each entrant of the race."""
    order: tuple[int, ...] = ()
    seeds: int = 0
    level: float = 0.95
    """Of the intervals, all of them together."""


@dataclass(frozen=True)
class Swept:
    """How a sweep stands."""

    sweep_id: str
    name: str
    metric: str
    trials: tuple[Trial, ...]
    race: tuple[Trial, ...]
    best: Trial | None
    verdict: Verdict
    device_s: float
    """Device-seconds of all trials and of the race."""
    run_id: str | None
    tracking_uri: str
    report: str = ""
    """URI of the page that shows it all."""

    @property
    def to_use(self) -> str:
        """The best one with its score and its values, in words; empty where there is none."""
        from scalecv.tasks.task import is_cost

        if self.best is None:
            return ""
        said, mean = entrant_name(self.best.number), (self.verdict.means or {}).get(self.best.number)
        sign = -1.0 if is_cost(self.metric) else 1.0
        if mean is not None:
            said += f", {self.metric} {mean:.4f} over {self.verdict.seeds} new seeds"
        elif self.best.points:
            said += f", {self.metric} {sign * self.best.value(sign):.4f}"
        return ": ".join([said, *([told(self.best.overrides)] if self.best.overrides else [])])


def verdict(race: Standing, metric: str, best: Trial | None, search: Search, least_s: float = 0.0) -> Verdict:
    """The verdict of a race that is over.

    Args:
        race: how it stands.
        metric: the objective.
        best: of the trials that were trained to their end.
        search: of the experiment.
        least_s: device-seconds of a budget that has room for a race, where there was none.
    """
    if search.scheduler == "pbt":
        return Verdict("not raced: values change on the way with search.scheduler=pbt, so no seed can repeat a trial")
    if not search.finalists:
        return Verdict("not raced: search.finalists=0, each trial had one seed")
    if race.needs:
        return Verdict("the race has not ended: search.budget is spent, a larger one goes on with it")
    if not race.order:
        room = f"search.budget={search.budget} had no room for it"
        whole = room if least_s else "no trial differs from the experiment as written"
        what = whole if best else "no trial was trained to its end"
        more = f"; with search.budget={math.ceil(1.1 * least_s / 60)}m the same command has room" if least_s else ""
        return Verdict(f"not raced: {what}{more}")
    first = race.order[0]
    told = Verdict("", None, race.pairs, dict(race.means), race.order, race.seeds, 1 - race.error)
    if len(race.order) < 2 or not race.pairs:
        return replace(told, sentence=f"not raced: all but {entrant_name(first)} failed")
    against = next((pair for pair in race.pairs if AS_WRITTEN in (pair.better, pair.other)), race.pairs[0])
    better, other = entrant_name(against.better), entrant_name(against.other)
    sure = f"{100 * told.level:.4g} %"
    how = f"{metric}, {sure} {against.low:.4f} to {against.high:.4f}, {against.seeds} paired seeds"
    if against.is_told_apart:
        said, winner = f"{better} is better than {other} by {against.effect:.4f} ({how})", against.better
        beaten = {pair.other: pair for pair in race.pairs if pair.is_told_apart}
        while over := beaten.get(winner):  # who led when the experiment as written dropped out may have been overtaken
            said += f", and {entrant_name(over.better)} is better than {entrant_name(winner)} by {over.effect:.4f}"
            winner = over.better
        tied = [entrant_name(one) for one in race.tied if one != winner]
        said += f"; no difference found from {', '.join(tied)}" if tied else ""
        return replace(told, sentence=said, winner=winner)
    worse = [entrant_name(pair.other) for pair in race.pairs if pair.is_told_apart]
    beside = f"; better than {', '.join(worse)}" if worse else ""
    said = (
        f"no difference found between {better} and {other}: {better} is ahead by {against.effect:.4f} ({how}){beside}"
    )
    return replace(told, sentence=said)


def best_trial(found: Verdict, trials: Sequence[Trial], race: Sequence[Trial], plan: Plan) -> Trial | None:
    """The trial to use: the first of the race, or of the search where there was none.

    One that the search did not train to its end has the bundle of its best seed, as has the experiment as written where
    that won.
    """
    raced = [one for one in found.order if one != AS_WRITTEN]
    first = found.winner if found.winner is not None else next(iter(raced), None)
    if first is None:
        return best_of(plan, trials)
    heats = [one for one in race if one.entrant == first and one.status == "finished"]
    best = Trial(AS_WRITTEN, {}) if first == AS_WRITTEN else trials[first]
    if best.status == "finished" or not heats:
        return best
    heat = max(heats, key=lambda one: one.value(plan.sign))
    return replace(
        best,
        status="finished",
        cause="",
        bundle=heat.bundle,
        weights_hash=heat.weights_hash,
        run_id=heat.run_id,
        metrics=heat.metrics,
    )


def entrant_name(entrant: int) -> str:
    """An entrant of the race in words."""
    return "the experiment as written" if entrant == AS_WRITTEN else f"trial {entrant}"


def table(trials: Sequence[Trial], metric: str) -> str:
    """The trials as a Markdown table."""
    lines = [f"| trial | status | epochs | {metric} | device-s | values |", "|---|---|---|---|---|---|"]
    for one in trials:
        value = f"{one.points[-1].value:.4f}" if one.points else ""
        what = told(one.overrides) + (f" ({one.cause})" if one.cause else "")
        lines.append(f"| {one.number} | {one.status} | {one.epochs} | {value} | {one.device_s:.0f} | {what} |")
    return "\n".join(lines) + "\n"


def as_json(swept: Swept) -> dict[str, Any]:
    """What `--json` prints."""
    keys = ("number", "run_id", "status", "metrics", "overrides", "device_s", "cost", "cause", "weights_hash", "bundle")

    def plain(one: Trial, *more: str) -> dict[str, Any]:
        return {key: getattr(one, key) for key in (*keys, *more)}

    return {
        **asdict(replace(swept, trials=(), race=())),
        "trials": [plain(one) for one in swept.trials],
        "race": [plain(one, "entrant", "seed") for one in swept.race],
        "best": None if swept.best is None else plain(swept.best),
    }
