"""`scalecv ensemble`: the mean of models that a sweep has paid for already, if it is better than the best of them.

candidates ──▶ soups ──▶ select (rows that choose) ──▶ one bundle ──▶ check (the other rows) ──▶ proposed or not
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from scalecv import storage
from scalecv.artifacts import bundle
from scalecv.artifacts.bundle import DataFacts
from scalecv.errors import ConfigError
from scalecv.models.facts import latency_ms as measure
from scalecv.search.candidates import Candidate, fields_of, find, place_of
from scalecv.search.ensemble_record import Event, Result, put, record
from scalecv.search.held_out import SPLIT, Mean, common_pixels
from scalecv.search.judge import Judge
from scalecv.search.selection import interval, select
from scalecv.search.soups import add_soups
from scalecv.serve.evaluate import check
from scalecv.shards.store import Dataset, open_dataset


def ensemble(
    runs: Sequence[str] = (),
    *,
    from_sweep: str | None = None,
    latency_ms: float,
    most: int = 5,
    to: str | None = None,
    data: str | None = None,
    metric: str | None = None,
    batch: int = 64,
    anyway: bool = False,
    experiment: str = "scalecv",
    allow_import: bool = False,
    tell: Callable[[Event], None] = lambda _: None,
) -> Result:
    """Average the probabilities of trained models, and keep that as one bundle if it is better than the best of them.

    Args:
        runs: bundle folders, runs:/ID, models:/NAME@ALIAS or names of runs.
        from_sweep: experiment file, name or folder of a sweep; what it and its race trained to the end takes part.
        latency_ms: most milliseconds that one image may take in all members together, on this machine.
        most: members.
        to: name of the result; that of the sweep and "-ensemble" if empty.
        data: dataset whose validation split decides; None takes that of training.
        metric: such as iou; None takes the task's headline.
        batch: images at a time.
        anyway: keep the ensemble also where it is not better.
        experiment: MLflow experiment of names and of the record, where no file names one.
        allow_import: let bundles whose networks are the user's own functions import them.
        tell: called with progress events.
    Raises: UserError: models that are not there or do not go together, or none within the latency.
    """
    place, sweep = place_of(from_sweep, to, experiment)
    candidates = find(runs, sweep, place)
    dataset = _dataset(candidates, data)
    for one in candidates:
        check(bundle.Bundle(one.uri, one.facts, torch.nn.Identity()), dataset.manifest, dataset.uri, SPLIT)
    with tempfile.TemporaryDirectory(prefix="scalecv-ensemble-") as folder:
        how: dict[str, Any] = {"batch": batch, "metric": metric, "allow_import": allow_import, "tell": tell}
        judge = Judge(candidates, dataset, Path(folder), **how)
        add_soups(judge)
        shares, best = _chosen(judge, latency_ms, most)
        made = str(Path(folder, "made"))
        put(made, bundle_of(judge, place.name, shares))
        result = _checked(judge, made, place.name, latency_ms, shares, best)
        is_kept = result.is_gain or (anyway and not result.is_single)
        scored = {result.metric: result.score, f"{SPLIT}/rows": float(result.rows_checking)}
        parts = bundle_of(judge, place.name, shares, result.threshold, scored) if is_kept else {}
        return record(result, place, parts, dataset, candidates[0].facts.task)


def _dataset(candidates: list[Candidate], data: str | None) -> Dataset:
    if data:
        return open_dataset(data)
    newest = max((one.facts.data for one in candidates), key=lambda seen: seen.version)
    return open_dataset(newest.uri, newest.version)


def _chosen(judge: Judge, budget_ms: float, most: int) -> tuple[list[float], int]:
    """The share of each candidate, and the number of the best trained model.

    Raises: ConfigError: none is fast enough.
    """
    costs = [one.latency_ms for one in judge.judged]
    fitting = [at for at, one in enumerate(judge.judged) if one.latency_ms <= budget_ms and one.bundle]
    chosen = select(judge.good, costs, budget_ms, most)
    if chosen is None or not fitting:
        fastest = min((one for one in judge.judged if one.bundle), key=lambda one: one.latency_ms)
        raise ConfigError(
            f"--latency-ms {budget_ms:g}: no trained model takes so little on this machine, the fastest is "
            f"{fastest.name} with {fastest.latency_ms:.2f} ms for one image"
        )
    best = max(fitting, key=lambda at: (judge.held.sign * judge.judged[at].score, -costs[at]))
    return [count / sum(chosen[0]) for count in chosen[0]], best


def _checked(judge: Judge, made: str, name: str, budget_ms: float, shares: Sequence[float], best: int) -> Result:
    """Whether the bundle that was made is better than the best trained model, on the rows that chose nothing."""
    held, single = judge.held, judge.judged[best]
    opened = bundle.open_bundle(made, allow_import=judge.allow_import)
    network = judge.behind(opened.facts, opened.model)
    ours: Mean = [(held.answers(network), 1.0)]
    theirs = judge.mean([int(at == best) for at in range(len(shares))])
    tuned, alone = held.exact_score(ours), held.exact_score(theirs)
    a = held.by_unit(held.confusions(ours, held.checking, tuned.threshold))
    b = held.by_unit(held.confusions(theirs, held.checking, alone.threshold))

    def gain(units: Any) -> float:
        times = np.bincount(units, minlength=a.shape[0])
        return held.sign * (held.of(times @ a) - held.of(times @ b))

    every = np.arange(a.shape[0])
    members = tuple(replace(one, weight=share) for one, share in zip(judge.judged, shares, strict=True) if share)
    return Result(
        name=name,
        metric=f"{SPLIT}/{held.metric}",
        members=members,
        single=single,
        score=held.of(a.sum(axis=0)),
        single_score=held.of(b.sum(axis=0)),
        gain=gain(every),
        interval=interval(gain, len(every)),
        is_single=len(members) == 1 and bool(shares[best]),
        threshold=tuned.threshold,
        latency_ms=measure(network, held.shape)[0],
        latency_budget_ms=budget_ms,
        rows_choosing=len(held.choosing),
        rows_checking=len(held.checking),
        candidates=tuple(judge.judged),
    )


def bundle_of(
    judge: Judge,
    name: str,
    shares: Sequence[float],
    threshold: float = 0.5,
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, bytes]:
    """The files of a bundle: of an ensemble, or of the one network that has the whole share.

    Args:
        judge: with the candidates.
        name: of the bundle.
        shares: of each candidate; they add up to 1.
        threshold: with which two classes are told apart.
        metrics: that the bundle tells.
    """
    manifest, used = judge.dataset.manifest, [at for at, share in enumerate(shares) if share]
    several = [judge.candidates[at] for at in used]
    first = several[0].facts
    told = fields_of(first) | {"name": name, "threshold": threshold, "metrics": dict(metrics)}
    if len(used) == 1 and first.pixels.size_px == judge.pixels.size_px:
        return bundle.parts(judge.weights(used[0]), **told | {"origins": several[0].origins})
    pixels = common_pixels([one.facts.pixels for one in several], manifest.sizes_px)
    pixels = pixels.model_copy(update={"size_px": judge.pixels.size_px, "resize": judge.pixels.resize})
    members = [one.member(shares[at], pixels, judge.held.sides) for at, one in zip(used, several, strict=True)]
    data = DataFacts(
        uri=storage.without_secrets(judge.dataset.uri),
        version=judge.dataset.version,
        fingerprint=manifest.fingerprint,
    )
    state = {
        f"members.{number}.network.{key}": value
        for number, at in enumerate(used)
        for key, value in judge.weights(at).items()
    }
    told |= {"pixels": pixels, "members": tuple(members), "upscale": None, "origins": (), "data": data, "epoch": 0}
    return bundle.parts(state, **told)
