"""What one training process does: build, resume, train, evaluate, leave a bundle and pictures."""

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist

from scalecv import malloc, storage
from scalecv.artifacts import bundle
from scalecv.artifacts.provenance import worker_facts
from scalecv.batches.feed import Feed, threads_per_rank
from scalecv.batches.pixels import Pixels, pixels_of
from scalecv.batches.plan import order_hash
from scalecv.cache import NodeCache
from scalecv.models import build_model
from scalecv.models.losses import balanced_weights
from scalecv.models.parts import freeze
from scalecv.models.recompute import recompute_blocks
from scalecv.shards.store import Dataset, open_dataset
from scalecv.tasks import task_for
from scalecv.tasks.task import Task, is_cost
from scalecv.train import checkpoint, exact, loop, upscaler
from scalecv.train.finish import finish
from scalecv.train.gallery import Gallery
from scalecv.train.job import Job, Place
from scalecv.train.loop import Event, Setup, State
from scalecv.train.network import check_takes
from scalecv.train.optim import build_optimizer
from scalecv.train.requests import Requests, Stopped
from scalecv.train.saving import Saver, call_of, facts_of, from_rank_0, restore
from scalecv.train.starting import start_from
from scalecv.train.watchdog import Watchdog, leave


def work(
    job: Job,
    place: Place,
    report: Callable[[list[Event]], None],
    *,
    stop: threading.Event | None = None,
    drains: Callable[[], bool] = lambda: False,
    end: Callable[[str], None] = leave,
) -> dict[str, Any]:
    """Run one rank from start, or from the newest checkpoint, to the end; the result, equal on all ranks.

    Args:
        job: what every rank is given.
        place: where this one runs.
        report: called equally often on every rank; what rank 0 says is recorded.
        stop: set by somebody in this process who wants the run to stop.
        drains: whether a node of this run is about to be taken away.
        end: ends this process, with a message, when it hangs.
    """
    track, scale = job.experiment.track, job.experiment.scale
    with (
        Watchdog(scale.hang_after_s, storage.join(job.run, "stacks"), f"rank{place.rank}", end) as watchdog,
        Requests(
            storage.join(job.run, "STOP"),
            track.checkpoint_minutes,
            rank=place.rank,
            ranks=place.ranks,
            stop=stop,
            drains=drains,
        ) as requests,
    ):
        return _work(job, place, report, requests, watchdog)


def _work(
    job: Job, place: Place, report: Callable[[list[Event]], None], requests: Requests, watchdog: Watchdog
) -> dict[str, Any]:
    experiment = job.experiment
    fixed = 1 if experiment.train.exact else None
    torch.set_num_threads(threads_per_rank(experiment.train.threads or fixed, place.ranks_on_node))
    if place.device == "cpu":
        malloc.keep_freed()
    if experiment.train.exact:
        exact.use_fixed_kernels(place.device)
    dataset = open_dataset(experiment.data.uri, job.dataset_version, experiment.cache)
    pixels = pixels_of(dataset.manifest, experiment.data, experiment.data.uri, experiment.task)
    task = task_for(experiment.task, pixels, experiment.model.arch, experiment.model.args)
    setup = _setup(job, place, dataset, task, pixels, report, requests, watchdog)
    state, notes, weights = _start(setup, job, place, pixels)
    if experiment.cache.dir and dataset.cache is None:
        notes.append(f"cache.dir is not used: {dataset.uri} lies on a disk, not in a bucket")
    more = {"scalecv.decode": "gpu" if setup.feeds["train"].gpu else "cpu"}
    facts = worker_facts(place.ranks, place.device, state.updates, more) | weights | upscaler.tags(setup.upscale)
    said: list[Event] = [{"kind": "progress", "message": note} for note in notes]
    report([_processes(), {"kind": "tags", "tags": facts}, *said, *state.recent])  # known points are not sent twice
    status = loop.fit(setup, state)
    result = {"status": status, "epochs": state.epoch, "order_hash": order_hash(state.order_total)}
    if status != "interrupted":
        setup.saver.settle()
        try:
            result |= finish(setup, state, job, dataset, pixels)
        except Stopped:
            result["status"] = "interrupted"
        else:
            hashes = {"data/order_hash": result["order_hash"], "weights_hash": result["weights_hash"]}
            report([{"kind": "tags", "tags": hashes}])
    report([*setup.saver.written(), *setup.gallery.close(), {"kind": "result", **result}])
    return result


def _processes() -> Event:
    """The processes of this run, by rank."""
    mine = (os.getpid(), socket.gethostname())
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return {"kind": "workers", "pids": [pid for pid, _ in everyone], "hosts": [host for _, host in everyone]}


def _setup(
    job: Job,
    place: Place,
    dataset: Dataset,
    task: Task,
    pixels: Pixels,
    report: Callable[[list[Event]], None],
    requests: Requests,
    watchdog: Watchdog,
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
            threads=threads_per_rank(experiment.data.decode_threads, place.ranks_on_node),
            max_bad=experiment.data.max_bad if split == "train" else 0.0,
            decode=experiment.data.decode,
            device=device,
            sampling=experiment.data.sampling,
            limit=experiment.data.limit,
            pixel_cache=NodeCache.of(experiment.cache) if experiment.cache.pixels == "yes" else None,
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
    larger = not is_cost(metric)

    upscale = upscaler.find(experiment)

    def about(state: State) -> dict[str, Any]:
        return facts_of(job, dataset, pixels, state, upscale)

    return Setup(
        experiment=experiment,
        task=task,
        feeds=feeds,
        device=device,
        rank=place.rank,
        ranks=place.ranks,
        threads=threads_per_rank(experiment.train.threads, place.ranks_on_node),
        class_weights=weights,
        metric=metric,
        larger_is_better=larger,
        run=job.run,
        report=report,
        saver=Saver(job.run, experiment.track.keep, place.rank, about, requests, watchdog.tick, larger=larger),
        requests=requests,
        watchdog=watchdog,
        gallery=Gallery(job.run, experiment.track.pictures, experiment.track.pictures_every, draws=place.rank == 0),
        upscale=upscale,
        until=job.until,
    )


def _reader(wanted: str, feed: Feed) -> str:
    """Ray Data where it pays: a split that fits into the window is read once, and starting Ray Data takes longer.

    With a cache the threads read, for it is this node's: Ray Data's tasks run on any, and keep there what they read.
    """
    if wanted == "auto":
        return "threads" if feed.keeps or feed.dataset.cache else "ray"
    return wanted


def _start(setup: Setup, job: Job, place: Place, pixels: Pixels) -> tuple[State, list[str], dict[str, str]]:
    """The state to go on from, what there is to say about it, and tags that name its starting weights."""
    experiment, train = job.experiment, job.experiment.train
    found, parts, skipped = from_rank_0(lambda: checkpoint.newest(job.run))
    model, notes, weights = _network(setup, job, place, pixels, is_fresh=not found)
    if train.recompute:
        recompute_blocks(model, experiment.model.arch)
    if setup.upscale:
        model = upscaler.behind(setup.upscale, experiment.upscale, pixels, model, allow_import=job.allow_import)
    model = model.to(setup.device)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if train.precision == "fp16" and setup.device.type == "cpu":
        notes.append("train.precision=fp16 needs a GPU: this run computes in fp32")
    optimizer = build_optimizer(model, train)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=train.precision == "fp16" and setup.device.type == "cuda")
    state = State(model, model, optimizer, scaler)
    notes += [f"passed over {reason}" for reason in skipped]
    if found and place.rank == 0:
        keep = experiment.track.keep + len(skipped)  # a damaged newest one must not push out what is in use
        checkpoint.collect(job.run, keep, larger_is_better=setup.larger_is_better)
        hangs = storage.list_names(storage.join(job.run, "stacks"))
        notes += [f"a process of this run hung before; its stacks are in {job.run}/stacks"] if hangs else []
    if found:
        upscaler.check_same(setup.upscale, bundle.read_facts(found.uri).upscale)
        restore(state, parts or checkpoint.read(found), place.rank, keep_threads=not (train.threads or train.exact))
        notes.append(f"goes on in epoch {state.epoch + 1} after step {state.step} ({found.uri})")
    network: torch.nn.Module = model
    if place.ranks > 1 and not train.exact:
        ids = [setup.device.index or 0] if setup.device.type == "cuda" else None
        # Some networks have weights that no gradient reaches (PSPNet and DPT leave parts of their encoder out). And DDP
        # cuts its buckets anew after the first step of a process, unless it looks for unused parameters: three and more
        # ranks add in an order that depends on the buckets, so a run that went on would round otherwise there.
        network = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=True
        )
    state.network = torch.compile(network) if train.compile else network  # type: ignore[assignment]
    return state, notes, weights


def _network(
    setup: Setup, job: Job, place: Place, pixels: Pixels, *, is_fresh: bool
) -> tuple[torch.nn.Module, list[str], dict[str, str]]:
    """The network as the seed draws it, with its starting weights where there is no checkpoint, and partly frozen."""
    experiment = job.experiment
    notes, tags = list[str](), dict[str, str]()
    torch.manual_seed(experiment.seed)
    model = build_model(**call_of(experiment, setup.task, pixels).model_dump(), allow_import=job.allow_import)
    if experiment.model.weights and is_fresh:
        loaded, tags = start_from(model, job, place.rank)
        notes.append(f"model.weights: {loaded}")
    frozen = freeze(model, experiment.model.freeze)
    if frozen:
        total = sum(p.numel() for p in model.parameters())
        notes.append(f"model.freeze: {frozen:,} of {total:,} parameters do not learn")
    if experiment.train.exact:
        exact.check(model)
    sizes_px = setup.feeds["train"].dataset.manifest.sizes_px
    check_takes(experiment, model, pixels, sizes_px, setup.ranks)
    return model, notes, tags
