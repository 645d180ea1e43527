"""Kinds of problems by name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scalecv.models.upscalers import factor_of
from scalecv.tasks.classify import CLASSIFY
from scalecv.tasks.segment import SEGMENT
from scalecv.tasks.task import Task
from scalecv.tasks.upscale import UPSCALE, upscaling

if TYPE_CHECKING:
    from scalecv.batches.pixels import Pixels

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFY, SEGMENT, UPSCALE)}


def task_for(name: str, pixels: "Pixels", arch: str, args: Mapping[str, Any]) -> Task:
    """The task as a network and its images need it."""
    return upscaling(factor_of(arch, args), pixels) if name == UPSCALE.name else TASKS[name]
