"""The end of a run: the best weights, scored on val and test, and what stays of them."""

import json
from typing import Any

from scalecv import storage
from scalecv.artifacts import bundle, scores
from scalecv.artifacts import report as reports
from scalecv.batches.pixels import Pixels
from scalecv.errors import IntegrityError
from scalecv.models.facts import latency_ms, model_facts
from scalecv.shards.store import Dataset
from scalecv.tasks import pictures
from scalecv.tasks.evaluate import Evaluation, gather
from scalecv.tasks.rows import RowSums
from scalecv.train import checkpoint, loop
from scalecv.train.job import Job
from scalecv.train.loop import Event, Setup, State
from scalecv.train.memory import peak_mb
from scalecv.train.network import input_shape
from scalecv.train.saving import facts_of, from_rank_0, now_ms
from scalecv.train.step import autocast
from scalecv.train.threshold import TUNED, chosen, fixed
from scalecv.train.writer import on_host


def finish(setup: Setup, state: State, job: Job, dataset: Dataset, pixels: Pixels) -> dict[str, Any]:
    """Load the best weights, score val and test with them, and leave bundle, tables and pictures."""
    peak = peak_mb(setup.device.type)
    last_hash = bundle.weights_hash(state.model.state_dict())
    top, _, skipped = from_rank_0(lambda: _best(job.run, larger=setup.larger_is_better))
    best_epoch = state.epoch
    if top:
        facts = bundle.read_facts(top.uri)
        state.model.load_state_dict(bundle.read_weights(top.uri, facts))
        best_epoch = facts.epoch
    metrics: dict[str, float] = {}
    train, best_hash = setup.experiment.train, bundle.weights_hash(state.model.state_dict())
    epoch: dict[str, float] = next((one for one in state.history if one["epoch"] == best_epoch), {})
    threshold = epoch.get(TUNED, fixed(train))
    events: list[Event] = [{"kind": "progress", "message": f"passed over {reason}"} for reason in skipped]
    for split in ("val", "test"):
        if split in setup.feeds:
            checked, rows = _scored(setup, state, split, threshold)
            if split == "val":
                threshold = chosen(train, setup.task, checked)
                events += _told(setup, checked, threshold)
                if threshold != rows.threshold:  # it was not foreseen: a checkpoint of an earlier version
                    checked, rows = _scored(setup, state, split, threshold)
            checked = checked.at(threshold)
            about = scores.About(
                task=setup.task.name,
                split=split,
                fingerprint=dataset.manifest.fingerprint,
                rows=checked.rows,
                classes=pixels.classes,
                threshold=threshold,
                weights_hash=best_hash,
            )
            if kept := scores.write(rows, about, job.run if setup.rank == 0 else ""):
                events.append({"kind": "artifact", "uri": kept, "folder": scores.FOLDER})
            metrics |= loop.summary(setup, checked, split)
            metrics[f"{split}/rows"] = float(checked.rows)
            if "probabilities" in checked.sums:
                metrics[f"{split}/threshold"] = checked.threshold
            if setup.rank == 0:
                key = "best/val" if split == "val" else split  # the last epoch's pictures have the same step
                events += reports.draw(setup.task, checked, pixels.classes, job.run, split, state.updates, key=key)
    metrics |= {name: value for name, value in state.history[-1].items() if name.startswith("train/")}
    shape = input_shape(setup.task, pixels, dataset.manifest)
    told = facts_of(job, dataset, pixels, state, setup.upscale)
    told |= {"metrics": metrics, "epoch": best_epoch, "threshold": threshold}
    parts = bundle.parts(on_host(state.model.state_dict()), **told)
    uri = storage.join(job.run, "bundles", f"{state.updates:08d}-{json.loads(parts[bundle.FACTS])['weights_hash'][:8]}")
    if setup.rank == 0:
        storage.put(storage.join(uri, bundle.WEIGHTS), parts[bundle.WEIGHTS])
        storage.put(storage.join(uri, bundle.FACTS), parts[bundle.FACTS])
        curves = storage.join(job.run, "pictures", "curves.png")
        storage.put(curves, pictures.curves_png(state.history))
        events.append({"kind": "artifact", "uri": curves, "folder": "pictures"})
        events.append({"kind": "model", "uri": uri, "name": "model"})
        final = {
            f"best/{k}" if k.startswith("val/") else k: v for k, v in metrics.items() if k.startswith(("val/", "test/"))
        }
        events.append({"kind": "metrics", "step": state.updates, "time_ms": now_ms(), "metrics": final})
        events += _costs(setup, state, shape, peak)
    setup.report(events)
    waits = [h["system/epoch_data_wait_share"] for h in state.history]
    speeds = [h["system/epoch_images_per_s"] for h in state.history]
    return {
        "metrics": metrics,
        "weights_hash": last_hash,
        "bundle": uri,
        "images_per_s": sorted(speeds)[len(speeds) // 2],
        "data_wait_share": sorted(waits)[len(waits) // 2],
        "best_epoch": best_epoch,
    }


def _scored(setup: Setup, state: State, split: str, threshold: float) -> tuple[Evaluation, RowSums]:
    """A split scored, the pictures of all ranks, and of this rank what each row adds to the metrics."""
    pictures = setup.experiment.track.pictures
    rows = RowSums(setup.task, setup.feeds[split].dataset.manifest.splits[split], threshold)
    checked = loop.validate(
        setup,
        state.model,
        split,
        each=lambda: loop.obey(setup),
        pictures=pictures,
        size=state.micro_batch,
        rows=rows,
    )
    return gather(checked, pictures), rows


def _told(setup: Setup, checked: Evaluation, threshold: float) -> list[Event]:
    """What a person is told of the threshold, and of a model that has learned nothing."""
    after, before = (loop.summary(setup, checked.at(at), "val") for at in (threshold, fixed(setup.experiment.train)))
    headline, lines = f"val/{setup.task.headline}", []
    if after != before:
        lines.append(
            f"threshold {threshold:.4g} (train.threshold, tuned on val): {headline} {after[headline]:.4f}, "
            f"{before[headline]:.4f} at {fixed(setup.experiment.train):.4g}"
        )
    if after.get("val/is_trivial"):
        lines.append(f"the model is trivial: {headline} {after[headline]:.4f} is that of background everywhere")
    return [{"kind": "progress", "message": line} for line in lines]


def _costs(setup: Setup, state: State, shape: tuple[int, int, int], peak: float | None) -> list[Event]:
    """What the network costs: counted, and measured on this rank's device at the precision of the run."""
    told = {"time/total_train_s": sum(epoch["time/train_s"] for epoch in state.history)}
    told |= {} if peak is None else {"system/peak_memory_mb": peak}
    events: list[Event] = []
    try:
        facts = model_facts(state.model, shape)
        events.append({"kind": "params", "params": {f"model.{name}": value for name, value in facts.items()}})
        with autocast(setup):
            p50, p95 = latency_ms(state.model, shape)
        told |= {"system/latency_p50_ms": p50, "system/latency_p95_ms": p95}
    except Exception as error:  # a network of the user's may refuse to be counted; the run does not fail for it
        events.append({"kind": "progress", "message": f"parameters, FLOPs and latency are not known: {error}"})
    return [*events, {"kind": "metrics", "step": state.updates, "time_ms": now_ms(), "metrics": told}]


def _best(run: str, *, larger: bool) -> tuple[Any, None, list[str]]:
    """The best checkpoint whose parts are as they were written, and what was passed over and why."""
    found, skipped = checkpoint.complete(run)
    while top := checkpoint.best(found, larger_is_better=larger):
        try:
            checkpoint.read(top)
            return top, None, skipped
        except IntegrityError as error:
            skipped.append(str(error))
            found = [one for one in found if one.uri != top.uri]
    return None, None, skipped
