"""What the network of an experiment costs: the shape of its images, and what one takes before any training."""

import torch

from scalecv.batches.pixels import Pixels, pixels_of
from scalecv.config import Experiment
from scalecv.models import build_model
from scalecv.models.facts import latency_ms, model_facts
from scalecv.shards.manifest import Manifest
from scalecv.shards.store import open_dataset
from scalecv.tasks import task_for
from scalecv.tasks.task import Task
from scalecv.train.saving import call_of


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
