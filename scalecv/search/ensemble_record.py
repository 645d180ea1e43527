"""What came of an ensemble: in words, on storage, and in MLflow."""

import json
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scalecv import storage
from scalecv.artifacts import bundle, spool, tracking
from scalecv.search.candidates import Place
from scalecv.search.judge import Judged
from scalecv.shards.store import Dataset
from scalecv.train.runs import cache_folder

Event = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What was found."""

    name: str
    metric: str
    members: tuple[Judged, ...]
    single: Judged
    """The best trained model within the latency."""
    score: float
    """Of the ensemble on the rows that check."""
    single_score: float
    """Of the best model on the same rows."""
    gain: float
    """Larger is better."""
    interval: tuple[float, float]
    """95 % of the gain, by a paired bootstrap over these rows, or over their scenes where there are enough."""
    is_single: bool
    """No mean was better than the best model on the rows that choose."""
    threshold: float
    latency_ms: float
    """Of the ensemble as a whole, one image on this machine."""
    latency_budget_ms: float
    rows_choosing: int
    rows_checking: int
    candidates: tuple[Judged, ...]
    bundle: str | None = None
    """Where the ensemble was written; None where it was not."""
    weights_hash: str | None = None
    run_id: str | None = None
    tracking_uri: str = ""
    is_gain: bool = field(init=False)
    """The whole interval lies above 0."""
    verdict: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_gain", self.interval[0] > 0 and not self.is_single)
        object.__setattr__(self, "verdict", _verdict(self))


def put(uri: str, parts: dict[str, bytes]) -> None:
    """Write the files of a bundle; it is there once it is described."""
    for name in (bundle.WEIGHTS, bundle.FACTS):
        storage.put(storage.join(uri, name), parts[name])


def record(result: Result, place: Place, parts: dict[str, bytes], dataset: Dataset, task: str) -> Result:
    """Write the bundle where there is one, and tell MLflow what was found."""
    key = uuid.uuid4().hex
    uri = tracking.tracking_uri(place.uri)
    home = storage.join(place.home, place.name, "ensembles", key[:8])
    where = storage.join(home, "bundle") if parts else None
    if where:
        put(where, parts)
        weights_hash = json.loads(parts[bundle.FACTS])["weights_hash"]
        result = replace(result, bundle=where, weights_hash=weights_hash)
    local = Path(home) if storage.is_local(home) else cache_folder() / key
    local.mkdir(parents=True, exist_ok=True)
    path = local / "spool.jsonl"
    origins = {one["weights_hash"]: one for member in result.members for one in member.origins}
    tags = {"scalecv.task": task, "scalecv.verdict": result.verdict, **tracking.run_facts()}
    tags |= {
        f"scalecv.member.{number}": f"runs:/{one['run_id']}"
        if one["run_id"]
        else f"{one['name']} {one['weights_hash']}"
        for number, one in enumerate(origins.values())
    }
    low, high = result.interval
    metrics = {result.metric: result.score, "single/" + result.metric: result.single_score}
    metrics |= {"gain": result.gain, "gain/low": low, "gain/high": high, "system/latency_p50_ms": result.latency_ms}
    params = {"latency_ms": result.latency_budget_ms, "members": len(result.members), "single": result.single.name}
    told = {**asdict(result), "bundle": where and storage.without_secrets(where)}
    about = {"uri": storage.without_secrets(dataset.uri), "version": dataset.version, "context": "validation"}
    events: list[Event] = [
        {"kind": "params", "params": params},
        {"kind": "dataset", "name": Path(dataset.uri).name, "digest": dataset.manifest.fingerprint, **about},
        {"kind": "metrics", "step": 0, "metrics": metrics},
        {"kind": "text", "file": "ensemble.json", "text": json.dumps(told, indent=1)},
        *([{"kind": "model", "uri": where, "name": "model"}] if where else []),
        {"kind": "end", "status": "FINISHED"},
    ]
    for event in events:
        spool.append(path, event)
    trouble = tracking.probe(uri)
    sender = tracking.Sender(path, local / "spool.sent.json", uri, place.experiment, place.name, key, tags)
    sender.close(5.0 if trouble else 60.0)
    return replace(result, run_id=sender.run_id, tracking_uri=storage.without_secrets(uri))


def _verdict(result: Result) -> str:
    said = (
        f"{result.metric} {result.score:.4f}, {result.gain:+.4f} over {result.single.name} alone (95 % interval "
        f"{result.interval[0]:+.4f} to {result.interval[1]:+.4f} on {result.rows_checking:,} rows that chose nothing)"
    )
    if result.is_single:
        return (
            f"no gain found: on the {result.rows_choosing:,} rows that choose no mean within "
            f"{result.latency_budget_ms:g} ms is better than {result.single.name} alone"
        )
    return said if result.is_gain else f"no gain found: {said}; {result.single.name} alone is proposed"
