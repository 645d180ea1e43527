"""Kinds of problems by name."""

from scalecv.tasks.classify import CLASSIFY
from scalecv.tasks.segment import SEGMENT
from scalecv.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFY, SEGMENT)}
