"""What one training process does: build, resume, train, evaluate, leave a bundle and pictures."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist

from scalecv import storage
from scalecv.artifacts import bundle
from scalecv.artifacts import report as reports
from scalecv.batches.feed import Feed, decode_threads
from scalecv.batches.pixels import Pixels, pixels_of
from scalecv.batches.plan import order_hash
from scalecv.config import Experiment
from scalecv.errors import ConfigError, IntegrityError
from scalecv.models import build_model, required_multiple
from scalecv.models.facts import model_facts
from scalecv.models.losses import balanced_weights
from scalecv.shards.store import Dataset, open_dataset
from scalecv.tasks import TASKS, pictures
from scalecv.tasks.evaluate import gather
from scalecv.tasks.task import Task
from scalecv.train import checkpoint, loop
from scalecv.train.job import Job, Place
from scalecv.train.loop import Event, Setup, State
from scalecv.train.optim import Progress, build_optimizer


def work(job: Job, place: Place, report: Callable[[list[Event]], None]) -> dict[str, Any]:
    """Run one rank from start, or from the newest checkpoint, to the end; the result, equal on all ranks."""
    experiment = job.experiment
    cores = os.cpu_count() or 1
    share = 1 if experiment.train.exact else max(1, cores // place.ranks_on_node)
    torch.set_num_threads(experiment.train.threads or share)
    dataset = open_dataset(experiment.data.uri, job.dataset_version)
    task = TASKS[experiment.task]
    pixels = pixels_of(dataset.manifest, experiment.data, experiment.data.uri)
    setup = _setup(job, place, dataset, task, pixels, report)
    state, notes = _start(setup, job, place, pixels)
    report([{"kind": "progress", "message": note} for note in notes])
    status = loop.fit(setup, state)
    result = {"status": status, "epochs": state.epoch, "order_hash": order_hash(state.order_total)}
    if status != "interrupted":
        result |= _finish(setup, state, job, dataset, pixels)
        hashes = {"data/order_hash": result["order_hash"], "weights_hash": result["weights_hash"]}
        report([{"kind": "tags", "tags": hashes}])
    report([{"kind": "result", **result}])
    return result


def _setup(
    job: Job, place: Place, dataset: Dataset, task: Task, pixels: Pixels, report: Callable[[list[Event]], None]
) -> Setup:
    experiment, manifest = job.experiment, dataset.manifest
    device = torch.device(place.device)
    feeds = {
        split: Feed(
            dataset=dataset,
            split=split,
            pixels=pixels,
            batch=experiment.train.batch,
            seed=experiment.seed,
            rank=place.rank,
            ranks=place.ranks,
            is_training=split == "train",
            window_mb=experiment.data.window_mb,
            threads=decode_threads(experiment.data.decode_threads, place.ranks_on_node),
        )
        for split, rows in manifest.splits.items()
        if rows
    }
    feeds = {split: replace(feed, reader=_reader(job.reader, feed)) for split, feed in feeds.items()}
    weights = None
    if experiment.loss.class_weights == "balanced":
        counts = manifest.class_counts.get("train", {})
        weights = balanced_weights([counts.get(name, 0) for name in manifest.classes]).to(device)
    metric = experiment.train.metric or (f"val/{task.headline}" if "val" in feeds else "train/loss")
    stop_file = storage.join(job.run, "STOP")
    return Setup(
        experiment=experiment,
        task=task,
        feeds=feeds,
        device=device,
        rank=place.rank,
        ranks=place.ranks,
        class_weights=weights,
        metric=metric,
        larger_is_better=not metric.endswith("loss"),
        report=report,
        save=lambda state, value: _save(job, place, dataset, pixels, state, value, larger=not metric.endswith("loss")),
        stop_requested=lambda: storage.exists(stop_file),
    )


def _reader(wanted: str, feed: Feed) -> str:
    """Ray Data where it pays: a split that fits into the window is read once, and starting Ray Data takes longer."""
    if wanted == "auto":
        return "threads" if feed.keeps else "ray"
    return wanted


def _start(setup: Setup, job: Job, place: Place, pixels: Pixels) -> tuple[State, list[str]]:
    """The state to go on from, and what there is to say about it."""
    experiment, train, notes = job.experiment, job.experiment.train, []
    _check_size(experiment, pixels, setup.feeds["train"].dataset.manifest.sizes_px)
    torch.manual_seed(experiment.seed)
    model = build_model(
        **call_of(experiment, setup.task, pixels).model_dump(),
        weights=experiment.model.weights,
        allow_import=job.allow_import,
    ).to(setup.device)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if train.precision == "fp16" and setup.device.type == "cpu":
        notes.append("train.precision=fp16 needs a GPU: this run computes in fp32")
    optimizer = build_optimizer(model, train)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=train.precision == "fp16" and setup.device.type == "cuda")
    state = State(model, model, optimizer, scaler)
    found, parts, skipped = _chosen(lambda: checkpoint.newest(job.run))
    notes += [f"passed over {reason}" for reason in skipped]
    if found:
        _restore(state, parts or checkpoint.read(found), place)
        notes.append(f"goes on from epoch {state.epoch}, step {state.step} ({found.uri})")
    network: torch.nn.Module = model
    if place.ranks > 1 and not train.exact:
        ids = [setup.device.index or 0] if setup.device.type == "cuda" else None
        network = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    state.network = torch.compile(network) if train.compile else network  # type: ignore[assignment]
    return state, notes


def _chosen(choose: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What rank 0 finds on storage, told to all ranks without the bytes: they never go on from different places."""
    if not dist.is_initialized():
        return choose()
    mine: tuple[Any, ...] = choose() if dist.get_rank() == 0 else ()
    box: list[Any] = [(mine[0], None, mine[2]) if mine else None]
    dist.broadcast_object_list(box, src=0)
    return mine or tuple(box[0])


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


def _check_size(experiment: Experiment, pixels: Pixels, sizes_px: tuple[int, int, int, int]) -> None:
    """Refuse images that a segmentation network cannot halve often enough."""
    model = experiment.model
    multiple = required_multiple(model.arch, model.encoder, model.args)
    sides = (pixels.size_px, pixels.size_px) if pixels.size_px else sizes_px[:2]
    if any(side % multiple for side in sides):
        fits = max(multiple, round(sides[0] / multiple) * multiple)
        raise ConfigError(
            f"images have {sides[0]}x{sides[1]} pixels, and {model.arch} with {model.encoder} needs multiples of "
            f"{multiple}: set data.size_px={fits}"
        )


def call_of(experiment: Experiment, task: Task, pixels: Pixels) -> bundle.Call:
    """The arguments that build an experiment's network."""
    model = experiment.model
    return bundle.Call(
        arch=model.arch,
        encoder=model.encoder,
        in_channels=model.in_channels or pixels.channels,
        outputs=task.outputs(len(pixels.classes)),
        stem=model.stem,
        norm=model.norm,
        args=model.args,
    )


def _save(
    job: Job, place: Place, dataset: Dataset, pixels: Pixels, state: State, value: float | None, *, larger: bool
) -> None:
    """Write a checkpoint on rank 0; all ranks wait, so that none runs ahead of what is saved."""
    if place.rank == 0:
        parts = bundle.parts(state.model.state_dict(), **_facts(job, dataset, pixels, state))
        parts[checkpoint.TENSORS] = checkpoint.pack_optimizer(state.optimizer)
        parts[checkpoint.STATE] = json.dumps(state.to_json()).encode()
        checkpoint.save(job.run, parts, state.updates, value)
        checkpoint.collect(job.run, job.experiment.track.keep, larger_is_better=larger)
    if dist.is_initialized():
        dist.barrier()


def _restore(state: State, parts: dict[str, bytes], place: Place) -> None:
    from safetensors.torch import load

    state.model.load_state_dict(load(parts[bundle.WEIGHTS]))
    checkpoint.unpack_optimizer(state.optimizer, parts[checkpoint.TENSORS])
    told = json.loads(parts[checkpoint.STATE])
    state.epoch, state.step, state.updates = told["epoch"], told["step"], told["updates"]
    state.epoch_loss, state.epoch_rows = told["epoch_loss"], told["epoch_rows"]
    state.order_total = int(told["order_total"], 16) if place.rank == 0 else 0
    state.progress = Progress(**told["progress"])
    state.history = told["history"]
    if told["scaler"]:
        state.scaler.load_state_dict(told["scaler"])


def _facts(job: Job, dataset: Dataset, pixels: Pixels, state: State) -> dict[str, Any]:
    experiment = job.experiment
    task = TASKS[experiment.task]
    last = state.history[-1] if state.history else {}
    return {
        "name": experiment.name,
        "task": experiment.task,
        "call": call_of(experiment, task, pixels),
        "pixels": bundle.pixel_facts(pixels),
        "classes": pixels.classes,
        "data": bundle.DataFacts(
            uri=storage.without_secrets(dataset.uri),
            version=dataset.version,
            fingerprint=dataset.manifest.fingerprint,
        ),
        "loss": experiment.loss.model_copy(
            update=experiment.loss.terms() or task.default_loss(len(pixels.classes))
        ).model_dump(),
        "metrics": {name: value for name, value in last.items() if name != "epoch"},
        "epoch": state.epoch,
    }


def _finish(setup: Setup, state: State, job: Job, dataset: Dataset, pixels: Pixels) -> dict[str, Any]:
    """Load the best weights, score val and test with them, and leave bundle, tables and pictures."""
    last_hash = bundle.weights_hash(state.model.state_dict())
    top, _, skipped = _chosen(lambda: _best(job.run, larger=setup.larger_is_better))
    best_epoch = state.epoch
    if top:
        facts = bundle.read_facts(top.uri)
        state.model.load_state_dict(bundle.read_weights(top.uri, facts))
        best_epoch = facts.epoch
    metrics: dict[str, float] = {}
    events: list[Event] = [{"kind": "progress", "message": f"passed over {reason}"} for reason in skipped]
    for split in ("val", "test"):
        if split in setup.feeds:
            checked = gather(
                loop.validate(setup, state.model, split, pictures=setup.experiment.track.pictures),
                setup.experiment.track.pictures,
            )
            metrics |= loop.summary(setup, checked, split)
            metrics[f"{split}/rows"] = float(checked.rows)
            if setup.rank == 0:
                events += reports.draw(setup.task, checked, pixels.classes, job.run, split, state.updates)
    metrics |= {name: value for name, value in state.history[-1].items() if name.startswith("train/")}
    size = pixels.size_px
    shape = (pixels.channels, size or dataset.manifest.sizes_px[1], size or dataset.manifest.sizes_px[0])
    told = _facts(job, dataset, pixels, state) | {"metrics": metrics, "epoch": best_epoch}
    parts = bundle.parts(state.model.state_dict(), **told)
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
        events.append({"kind": "metrics", "step": state.updates, "time_ms": _now_ms(), "metrics": final})
        try:
            events.append(
                {"kind": "params", "params": {f"model.{k}": v for k, v in model_facts(state.model, shape).items()}}
            )
        except Exception as error:  # a network of the user's may refuse to be counted; the run does not fail for it
            events.append({"kind": "progress", "message": f"parameters and FLOPs were not counted: {error}"})
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


def _now_ms() -> int:
    import time

    return int(time.time() * 1000)
