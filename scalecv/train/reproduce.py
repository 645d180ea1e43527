"""`scalecv reproduce`: run a recorded run again from what it logged, and say how near the result is.

identical      equal order of rows, equal weights, bit for bit
within noise   equal order of rows, other weights, and the task's headline metric within the tolerance of each split
differs        anything else; with the first step of another loss, and the first recorded input that differs
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from scalecv import storage
from scalecv.artifacts import provenance
from scalecv.artifacts.compare import LATER, Comparison, Difference, compare_records, differences
from scalecv.artifacts.record import Record, read_record, tell_tags
from scalecv.config import Experiment, build, with_overrides
from scalecv.errors import ConfigError, DataError, ScalecvError, UserError
from scalecv.shards.store import open_dataset
from scalecv.train.run import train

MAY_CHANGE = (
    "data.uri",
    "data.get",
    "data.reader",
    "data.decode",
    "data.decode_threads",
    "train.threads",
    "scale.",
    "track.storage",
    "track.experiment",
)
"""Keys that say where and on what a run is repeated; every other key stays as recorded."""
HASHES = ("data/order_hash", "weights_hash")
Z = 1.96
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True)
class Reproduction:
    """What came out."""

    run_id: str
    """The run that this command made."""
    reproduced_run_id: str
    """The run that it repeats."""
    verdict: Literal["identical", "within noise", "differs"]
    first_step: int | None
    """First recorded point (updates done) with another loss; None where all are equal."""
    because: str | None
    """data, code, environment, hardware, or "no recorded reason"; None where the result is identical."""
    reason: str
    """The verdict as a sentence."""
    differences: list[Difference]
    weights_hash: str
    order_hash: str
    recorded_weights_hash: str
    recorded_order_hash: str
    metrics: dict[str, tuple[float | None, float | None]]
    """Recorded and now."""


def reproduce(
    run: str,
    *,
    to: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    new: bool = False,
    allow_import: bool = False,
    code_dirs: tuple[str, ...] = (),
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Reproduction:
    """Repeat a recorded run under another name, compare the two, and log the verdict with the new run.

    Args:
        run: `runs:/ID`, or the name of a run.
        to: name of the new run; NAME-reproduced if empty.
        overrides: keys of MAY_CHANGE to set.
        new: start over under the new name.
        allow_import: whether the record may name code to import.
        code_dirs: folders with the user's own modules.
        tell: called with each event, for a live display.
    Raises: UserError: the record, its data or the keys do not allow it; nothing was started.
        Interrupted: stopped on request, the same command goes on. ScalecvError: the run failed.
    """
    record = read_record(run)
    _check_ended(record)
    experiment = _again(record, to, dict(overrides or {}))
    _check_data(record, experiment)
    for line in _beforehand(record, experiment):
        tell({"kind": "progress", "message": line})
    result = train(experiment, new=new, code_dirs=code_dirs, allow_import=allow_import, tell=tell)
    if result.was_complete:
        tell({"kind": "progress", "message": f"{experiment.name} was complete already: the verdict is about that run"})
    made = read_record(result.run_id) if result.run_id else None
    if made is None or any(name not in made.tags for name in HASHES):
        raise ScalecvError(
            f"{experiment.name} is trained, but MLflow has not taken all of its record: no verdict yet. "
            "Once MLflow answers, the same command gives it"
        )
    compared = compare_records(record, made)
    reproduction = judge(compared, experiment.task)
    verdict = {"scalecv.verdict": reproduction.verdict, "scalecv.verdict_reason": reproduction.reason}
    tell_tags(made.run_id, {"scalecv.reproduces": record.run_id, **verdict})
    return reproduction


def judge(compared: Comparison, task: str) -> Reproduction:
    """The verdict on a recorded run (a) and its repetition (b), from their records alone."""
    a, b = compared.a, compared.b
    first_step, because, why = None, None, "equal order of rows, equal weights"
    verdict: Literal["identical", "within noise", "differs"] = "identical"
    if not (compared.order_equal and compared.weights_equal):
        noise = _within_noise(compared, task)
        verdict = "within noise" if noise and compared.order_equal else "differs"
        because, cause = _cause(compared)
        first_step = compared.parting.step if compared.parting else None
        where = "only after the last recorded loss"
        if compared.parting:
            one = compared.parting
            where = f"first at step {one.step} ({one.curve} {one.a:.9g}, now {one.b:.9g})"
        order = "" if compared.order_equal else "the order of rows is another; "
        why = f"{order}{where}, {cause}" + (f"; {noise}" if noise and compared.order_equal else "")
    return Reproduction(
        run_id=b.run_id,
        reproduced_run_id=a.run_id,
        verdict=verdict,
        first_step=first_step,
        because=because,
        reason=f"{verdict}: {why}",
        differences=compared.differences,
        weights_hash=b.tags["weights_hash"],
        order_hash=b.tags["data/order_hash"],
        recorded_weights_hash=a.tags["weights_hash"],
        recorded_order_hash=a.tags["data/order_hash"],
        metrics=compared.metrics,
    )


def tolerance(a: float, b: float, rows: float) -> float:
    """How far two scores between 0 and 1, each over `rows` rows, may lie apart by chance (two-proportion test, 95 %).

    For an accuracy p the variance of one row is p (1 - p); for any other score between 0 and 1 it is at most that.
    """
    p = min(1.0, max(0.0, (a + b) / 2))
    return Z * math.sqrt(2 * p * (1 - p) / max(1.0, rows))


def _within_noise(compared: Comparison, task: str) -> str:
    """What is within the tolerance, as words; empty where something is not, or nothing was scored."""
    from scalecv.tasks import TASKS

    said = []
    for split in ("best/val", "test"):
        name = f"{split}/{TASKS[task].headline}"
        a, b = compared.metrics.get(name, (None, None))
        rows = compared.metrics.get(f"{split}/rows", (None, None))
        if a is None and b is None:
            continue
        if a is None or b is None or rows[0] != rows[1] or not rows[0]:
            return ""
        allowed = tolerance(a, b, rows[0])
        if not abs(a - b) <= allowed:
            return ""
        said.append(f"{name} {a:.4f}, now {b:.4f} on {rows[0]:.0f} rows (±{allowed:.4f} is chance)")
    return ", ".join(said)


def _cause(compared: Comparison) -> tuple[str, str]:
    """The kind of the first recorded input that differs, and the words for all of them."""
    known = [one for one in compared.differences if one.is_known]
    if not known:
        return "no recorded reason", f"for no recorded reason: {_unrecorded(compared)}"
    kind = _kind(known[0])
    others = sorted({_kind(one) for one in known} - {kind})
    more = f" (other inputs that differ: {', '.join(others)})" if others else ""
    return kind, f"because of {kind}: {known[0]}{more}"


def _kind(difference: Difference) -> str:
    return "code" if difference.kind == "experiment" else difference.kind


def _unrecorded(compared: Comparison) -> str:
    """What may differ although no recorded input does."""
    tags, said = compared.b.tags, []
    if tags.get("scalecv.cuda", "none") != "none":
        said.append("nondeterminism of GPU kernels")
    if int(tags.get("scalecv.ranks", "1")) > 1:
        said.append("nondeterminism of the order in which workers add up gradients")
    for one in (compared.a, compared.b):
        if "scalecv.resumed_at" in one.tags:
            where = one.tags["scalecv.resumed_at"]
            said.append(f"run {one.run_id} went on from update {where}, and only its last part is recorded")
    return "; ".join(said) or "nondeterminism of CPU kernels, or an input that is not recorded"


def _check_ended(record: Record) -> None:
    lacks = [name for name in HASHES if name not in record.tags]
    if record.status != "FINISHED" or lacks:
        found = f"its status is {record.status}" if record.status != "FINISHED" else f"it has no tag {lacks[0]}"
        raise UserError(f"run {record.run_id} ({record.name}) cannot be reproduced, {found}: let it train to its end")


def _again(record: Record, to: str | None, overrides: dict[str, Any]) -> Experiment:
    """The recorded experiment under its new name, with data version, threads and micro-batches as they were."""
    fixed = [key for key in overrides if not key.startswith(MAY_CHANGE)]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} is a part of what is reproduced; only {', '.join(MAY_CHANGE)} may be set. For another "
            f"experiment: scalecv train runs:/{record.run_id} name=NAME {fixed[0]}={overrides[fixed[0]]}"
        )
    where = f"run {record.run_id}"
    recorded = build(record.experiment, where)
    if "gpu" in (overrides.get("data.decode"), recorded.data.decode) and "data.decode" in overrides:
        raise ConfigError(
            f"data.decode={recorded.data.decode} is a part of what is reproduced: the GPU's pixels are others. For "
            f"another experiment: scalecv train runs:/{record.run_id} name=NAME data.decode={overrides['data.decode']}"
        )
    name = to or f"{recorded.name[:88]}-reproduced"
    if name == recorded.name:
        raise ConfigError(f"--to {name} is the recorded run's own name: give the new run another one")
    # The record lies in the MLflow in use, so the new run goes there too.
    pinned = {"name": name, "data.version": int(record.data["version"]), "track.uri": None}
    threads = record.tags.get("scalecv.threads", "")
    if recorded.train.threads is None and not recorded.train.exact and threads.isdigit():
        pinned["train.threads"] = int(threads)
    if recorded.train.micro_batch == "auto" and record.micro_batch and "scale.workers" not in overrides:
        pinned["train.micro_batch"] = record.micro_batch
    return build(with_overrides(record.experiment, {**pinned, **overrides}), where)


def _check_data(record: Record, experiment: Experiment) -> None:
    """See that the data is what it was.

    Raises: DataError: version or fingerprint are not the recorded ones.
    """
    version, was = record.data["version"], record.data["fingerprint"]
    where = storage.without_secrets(experiment.data.uri)
    try:
        now = open_dataset(experiment.data.uri, int(version)).manifest.fingerprint
    except DataError as error:
        raise DataError(
            f"run {record.run_id} was trained on version {version} of {where} (fingerprint {was[:12]}), which is not "
            f"there: {error}. Nothing was started; if the data moved, set data.uri"
        ) from None
    if not now.startswith(was):
        raise DataError(
            f"version {version} of {where} is not the data that run {record.run_id} was trained on: its fingerprint is "
            f"{now[:12]}, recorded was {was[:12]}. Nothing was started; bring that version back, or set data.uri"
        )


def _beforehand(record: Record, experiment: Experiment) -> list[str]:
    """What is known to differ before the run starts, one line for each kind."""
    gone = ("scalecv.git.", "mlflow.source.git.", "scalecv.version.")
    tags = {key: value for key, value in record.tags.items() if not key.startswith(gone)} | provenance.run_facts()
    tags["scalecv.ranks"] = str(max(1, experiment.scale.workers))
    if experiment.train.threads:
        tags["scalecv.threads"] = str(experiment.train.threads)
    now = replace(record, experiment=experiment.model_dump(mode="json"), tags=tags)
    found = [one for one in differences(record, now) if one.is_known]
    lines = [
        f"{kind} differs from the record: {', '.join(str(one) for one in found if _kind(one) == kind)}"
        for kind in dict.fromkeys(_kind(one) for one in found)
    ]
    raised = sorted(key.removeprefix(LATER) for key in record.tags if key.startswith(LATER))
    if raised:
        lines.append(f"{', '.join(raised)} changed during the recorded run; the new one has the last value throughout")
    return lines
