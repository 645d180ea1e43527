"""How a sweep stands: as a record, as a table, as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scalecv.search.space import told
from scalecv.search.trials import Trial


@dataclass(frozen=True)
class Swept:
    """How a sweep stands."""

    sweep_id: str
    name: str
    metric: str
    trials: tuple[Trial, ...]
    best: Trial | None
    verdict: str
    """What the figures allow to say."""
    run_id: str | None
    tracking_uri: str


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
    keys = ("number", "run_id", "status", "metrics", "overrides", "device_s", "cause", "weights_hash", "bundle")
    trials = [{key: getattr(one, key) for key in keys} for one in swept.trials]
    best = None if swept.best is None else trials[swept.best.number]
    return {**asdict(swept), "trials": trials, "best": best}
