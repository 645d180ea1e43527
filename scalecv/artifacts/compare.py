"""`scalecv compare`: in what two recorded runs differ, and where their curves part. Only what was recorded counts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scalecv.artifacts.provenance import PACKAGES
from scalecv.artifacts.record import Record
from scalecv.config import build, flatten
from scalecv.errors import ConfigError

KINDS = ("data", "experiment", "code", "environment", "hardware")
"""Kinds of input, in the order in which the first difference is looked for."""

TAGS = {
    "experiment": ("scalecv.starting_weights_hash",),
    "code": ("scalecv.version.scalecv", "mlflow.source.git.commit", "scalecv.git.changes", "scalecv.code"),
    "environment": (
        *(f"scalecv.version.{name}" for name in PACKAGES if name != "scalecv"),
        "scalecv.python",
        "scalecv.cuda",
        "scalecv.gpu_driver",
    ),
    "hardware": (
        "scalecv.device",
        "scalecv.ranks",
        "scalecv.threads",
        "scalecv.decode",
        "scalecv.cpu_capability",
        "scalecv.worker_cpu",
        "scalecv.gpu",
        "scalecv.cpu",
        "scalecv.cpu_count",
        "scalecv.platform",
    ),
}
ELSEWHERE = (
    "name",
    "question",
    "track.",
    "scale.",
    "train.threads",
    "data.uri",
    "data.version",
    "data.get",
    "data.reader",
    "data.decode_threads",
    "data.max_bad",
)
"""Keys of an experiment that say where and how it runs: what they led to stands under data and hardware."""
LATER = "scalecv.now."
SIDES = ("system/", "time/")
"""Metrics that differ from run to run anyway."""


@dataclass(frozen=True)
class Difference:
    """One input that two runs have different."""

    kind: str
    """One of KINDS."""
    key: str
    a: str | None
    """None: not recorded."""
    b: str | None

    @property
    def is_known(self) -> bool:
        """Whether both runs recorded it; what one did not record may have been equal."""
        return self.a is not None and self.b is not None

    def __str__(self) -> str:
        a, b = ("(not recorded)" if value is None else value for value in (self.a, self.b))
        return f"{self.key} {a} → {b}"


@dataclass(frozen=True)
class Parting:
    """The first point at which two curves have different values."""

    step: int
    """Updates done at that point; the loss may differ since the point before it."""
    curve: str
    a: float
    b: float


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other."""

    a: Record
    b: Record
    first: Difference | None
    """The first input that both recorded and that differs, in the order of KINDS."""
    differences: list[Difference]
    """All inputs that differ or that one run did not record."""
    metrics: dict[str, tuple[float | None, float | None]]
    order_equal: bool | None
    """None: a run without hash."""
    weights_equal: bool | None
    parting: Parting | None
    """None: equal wherever both have a point of one meaning."""
    points: int
    """How many points both have."""


def compare_records(a: Record, b: Record) -> Comparison:
    """Compare two records."""
    found = list(differences(a, b))
    names = [name for name in sorted({*a.metrics, *b.metrics}) if not name.startswith(SIDES)]
    return Comparison(
        a=a,
        b=b,
        first=next((one for one in found if one.is_known), None),
        differences=found,
        metrics={name: (a.metrics.get(name), b.metrics.get(name)) for name in names},
        order_equal=_equal(a, b, "data/order_hash"),
        weights_equal=_equal(a, b, "weights_hash"),
        parting=parting(a, b),
        points=sum(len(set(values) & set(b.curves.get(curve, {}))) for curve, values in a.curves.items()),
    )


def differences(a: Record, b: Record) -> Iterator[Difference]:
    """Inputs that differ, kind by kind."""
    if not a.data or a.data.get("fingerprint") != b.data.get("fingerprint"):
        for key in ("fingerprint", "version", "uri"):
            yield from _different("data", key, a.data.get(key), b.data.get(key))
    yield from _of_experiments(a, b)
    for kind, names in TAGS.items():
        for name in names:
            yield from _different(kind, _short(name), a.tags.get(name), b.tags.get(name))
        if kind == "hardware":
            yield from _at_first(a, b, kind, ("scale.workers",))


def parting(a: Record, b: Record) -> Parting | None:
    """The earliest point where a curve differs; batch losses only where both are means over the same steps."""
    same_points = _every(a) == _every(b)
    found = [
        Parting(step, curve, values[step], b.curves[curve][step])
        for curve, values in a.curves.items()
        if same_points or curve != "train/batch_loss"
        for step in values
        if step in b.curves.get(curve, {}) and not _same(values[step], b.curves[curve][step])
    ]
    return min(found, key=lambda one: one.step, default=None)


def _of_experiments(a: Record, b: Record) -> Iterator[Difference]:
    ours, theirs = _flat(a), _flat(b)
    keys = [key for key in {**ours, **theirs} if not key.startswith(ELSEWHERE)]
    for key in keys:
        yield from _different("experiment", key, ours.get(key, "(none)"), theirs.get(key, "(none)"))
    yield from _at_first(a, b, "experiment", [key for key in keys if ours.get(key) == theirs.get(key)])


def _at_first(a: Record, b: Record, kind: str, keys: list[str] | tuple[str, ...]) -> Iterator[Difference]:
    """Keys that a later command of the same run changed, such as train.epochs, as they were in the beginning."""
    for key in keys:
        if LATER + key in a.tags or LATER + key in b.tags:
            yield from _different(kind, f"{key} in the beginning", a.params.get(key), b.params.get(key))


def _flat(record: Record) -> dict[str, str]:
    """Keys and values with defaults filled in, so that a key that came later is no difference by itself.

    For train.micro_batch=auto stands what was found.
    """
    try:
        tree = build(record.experiment, record.name).model_dump(mode="json")
    except ConfigError:
        tree = record.experiment  # of a version whose keys this one does not know
    flat = {key: _text(value) for key, value in flatten(tree).items() if value != {}}
    if flat.get("train.micro_batch") == "auto" and record.micro_batch:
        flat["train.micro_batch"] = str(record.micro_batch)
    return flat


def _different(kind: str, key: str, a: str | None, b: str | None) -> Iterator[Difference]:
    if a != b:
        yield Difference(kind, key, a, b)


def _text(value: object) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _short(tag: str) -> str:
    """`torch` for `scalecv.version.torch`."""
    return tag.removeprefix("mlflow.source.").removeprefix("scalecv.").removeprefix("version.").replace("git.", "git ")


def _every(record: Record) -> object:
    track = record.experiment.get("track")
    return track.get("log_every") if isinstance(track, dict) else None


def _equal(a: Record, b: Record, tag: str) -> bool | None:
    return a.tags[tag] == b.tags[tag] if tag in a.tags and tag in b.tags else None


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
