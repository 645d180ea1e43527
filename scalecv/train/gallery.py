"""Pictures of validations, drawn and written by a thread of rank 0 while training goes on."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from scalecv.artifacts import report
from scalecv.errors import ScalecvError
from scalecv.tasks.evaluate import Evaluation
from scalecv.tasks.task import Task

Event = dict[str, Any]

EACH = 6
"""Most samples on each picture of a validation."""
WAITING = 3
"""Validations that may wait to be drawn; a run that is faster than its pictures leaves some out."""


class Gallery:
    """Draws one validation after the other; what training waits for is the copy of a few samples."""

    def __init__(self, run: str, count: int, every: int, *, draws: bool) -> None:
        """Draw for one run.

        Args:
            run: URI of the run; pictures lie below pictures/SPLIT/UPDATES in it.
            count: samples on each picture, at most EACH; 0 draws nothing.
            every: epochs from one drawing to the next; 0 draws nothing.
            draws: whether this rank does; the others only give their samples.
        """
        self.run, self.count, self.every, self.draws = run, min(count, EACH), every, draws
        self.work: queue.Queue[Callable[[], list[Event]] | None] = queue.Queue(WAITING)
        self.events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def samples(self, epoch: int) -> int:
        """Samples to keep of the validation after an epoch, counted from 0; the same on all ranks."""
        return self.count if self.every and (epoch + 1) % self.every == 0 else 0

    def show(self, task: Task, checked: Evaluation, classes: tuple[str, ...], updates: int) -> None:
        """Have the pictures of a validation drawn, unless WAITING others wait already."""
        if not self.draws or self.work.full():
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._draw, name="pictures", daemon=True)
            self.thread.start()
        self.work.put(lambda: report.draw_epoch(task, checked, classes, self.run, "val", updates))

    def drawn(self) -> list[Event]:
        """What names the pictures that were finished since the last call.

        Raises: what drawing raised.
        """
        if self.error is not None:
            raise self.error
        told = []
        while not self.events.empty():
            told += self.events.get()
        return told

    def close(self, timeout_s: float = 60.0) -> list[Event]:
        """Wait until all is drawn, for at most so long; what names the last pictures."""
        if self.thread is not None and self.error is None:
            self.work.put(None)
            self.thread.join(timeout_s)
            self.thread = None
        return self.drawn()

    def _draw(self) -> None:
        try:
            while (work := self.work.get()) is not None:
                try:
                    self.events.put(work())
                except (OSError, ScalecvError) as error:  # a picture is not worth a run
                    self.events.put([{"kind": "progress", "message": f"pictures were not written: {error}"}])
        except BaseException as error:
            self.error = error
