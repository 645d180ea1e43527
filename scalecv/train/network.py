"""The network of an experiment before it learns: whether it can take the images, and what one of them costs."""

import torch

from scalecv.batches.pixels import Pixels, pixels_of
from scalecv.config import Experiment
from scalecv.models import build_model
from scalecv.models.dry_run import check_fits
from scalecv.models.facts import latency_ms, model_facts
from scalecv.models.parts import freeze
from scalecv.models.upscalers import factor_of
from scalecv.shards.manifest import Manifest
from scalecv.shards.store import open_dataset
from scalecv.tasks import task_for
from scalecv.tasks.task import Task
from scalecv.train.checks import SHARDS
from scalecv.train.saving import call_of


def check_builds(experiment: Experiment, manifest: Manifest) -> None:
    """Build the network without its weights, and throw it away; one's own function is its author's affair.

    Raises: ConfigError: it cannot be built, nothing of it would learn, or it cannot take the images.
    """
    if ":" in experiment.model.arch:
        return
    pixels = pixels_of(manifest, experiment.data, experiment.data.uri, experiment.task)
    task = task_for(experiment.task, pixels, experiment.model.arch, experiment.model.args)
    model = build_model(**call_of(experiment, task, pixels).model_dump())
    freeze(model, experiment.model.freeze)
    check_takes(experiment, model, pixels, manifest.sizes_px, max(1, experiment.scale.workers))


def check_takes(
    experiment: Experiment, model: torch.nn.Module, pixels: Pixels, sizes_px: tuple[int, int, int, int], ranks: int
) -> None:
    """Raises: ConfigError: images would vanish in the network, or it would normalise them one by one.

    Args:
        experiment: of the network.
        model: in training mode.
        pixels: as which it sees images.
        sizes_px: smallest width and height of the images, and largest.
        ranks: that share a batch.
    """
    train = experiment.train
    if ":" in experiment.model.arch:
        return
    share = train.batch // (SHARDS if train.exact else ranks)
    images = train.micro_batch if isinstance(train.micro_batch, int) else share
    if experiment.model.norm == "sync":
        images *= ranks
    sides = (pixels.size_px, pixels.size_px) if pixels.size_px else (sizes_px[1], sizes_px[0])
    smaller = factor_of(experiment.model.arch, experiment.model.args) if experiment.task == "upscale" else 1
    seen = (side * experiment.upscale.factor // smaller for side in sides)
    check_fits(model, (images, pixels.channels, *seen), experiment.model.arch)


def input_shape(task: Task, pixels: Pixels, manifest: Manifest) -> tuple[int, int, int]:
    """C, H, W of an image as the network sees it; of images of several sizes, of the smallest sides."""
    width, height = (pixels.size_px, pixels.size_px) if pixels.size_px else manifest.sizes_px[:2]
    _, *shape = task.prepare({"image": torch.zeros(1, pixels.channels, height, width)})["image"].shape
    return shape[0], shape[1], shape[2]


def cost_of(experiment: Experiment, cost: str) -> float:
    """Cost of one image through the network, at fp32 on the device that its run takes.

    Args:
        experiment: without an upscale stage.
        cost: latency_ms (median of batches of one, milliseconds), parameters (count) or flops.
    """
    manifest = open_dataset(experiment.data.uri, experiment.data.version).manifest
    pixels = pixels_of(manifest, experiment.data, experiment.data.uri, experiment.task)
    task = task_for(experiment.task, pixels, experiment.model.arch, experiment.model.args)
    shape = input_shape(task, pixels, manifest)
    model = build_model(**call_of(experiment, task, pixels).model_dump(), allow_import=True)
    if cost != "latency_ms":
        return float(model_facts(model, shape)[cost])
    on_gpu = experiment.scale.gpu != "no" and torch.cuda.is_available()
    return latency_ms(model.to("cuda" if on_gpu else "cpu"), shape)[0]
