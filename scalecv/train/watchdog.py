"""Notices a process that has stopped moving: saves the stacks of its threads and ends it.

A rank that hangs makes all others wait for it, so each of them finds out for itself. A process that was itself stopped
and goes on (Ctrl-Z, SIGCONT) has not hung; the others may have ended it meanwhile.
"""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from scalecv import storage

LINGER_S = 3.0
"""Seconds between saving the stacks and the end: time for the other ranks, which hang too, to save theirs."""
STORE_S = 20.0
"""Seconds that saving the stacks may take, for storage may be what hangs."""
LEAVE_S = 2.0
"""Seconds that a thread beside training has to end: one that meets the end of the interpreter may abort the process."""
BUSY = 0.2
"""Share of a core above which start-up (imports, building, torch.compile) counts as moving."""


class Watchdog:
    """Watches this process from `__enter__` to `__exit__`."""

    def __init__(self, after_s: float, folder: str, name: str, end: Callable[[str], None]) -> None:
        """Watch.

        Args:
            after_s: seconds without `tick` that are a hang. Before the first one, a busy process moves.
            folder: URI below which the stacks are saved.
            name: of this process, such as rank1.
            end: called with a message, after the stacks were saved; ends the process.
        """
        self.after_s, self.folder, self.name, self.end = after_s, folder, name, end
        self.moved_at, self.has_moved = time.monotonic(), False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join(LEAVE_S)

    def tick(self) -> None:
        """There was progress: a step, a batch that was scored, a part that was written."""
        self.moved_at, self.has_moved = time.monotonic(), True

    def _watch(self) -> None:
        pause = min(1.0, self.after_s / 5)
        looked, cpu_s = time.monotonic(), time.process_time()
        while not self.ended.wait(pause):
            now, used = time.monotonic(), time.process_time()
            slept = now - looked
            if slept > pause + 5:  # this process was stopped itself
                self.moved_at += slept - pause
            elif not self.has_moved and used - cpu_s > BUSY * slept:
                self.moved_at = now
            looked, cpu_s = now, used
            if now - self.moved_at > self.after_s:
                self._bark()
                return

    def _bark(self) -> None:
        uri = storage.join(self.folder, f"{self.name}-{os.getpid()}.txt")
        saving = threading.Thread(target=_save_stacks, args=(uri,), daemon=True)
        saving.start()
        saving.join(STORE_S)
        if self.ended.wait(LINGER_S):
            return  # it moved after all, and came to its end
        where = storage.without_secrets(uri)
        self.end(
            f"{self.name} did not move for {self.after_s:g} s (scale.hang_after_s): the stacks of its threads are in "
            f"{where}. The same command goes on from the last checkpoint"
        )


def _save_stacks(uri: str) -> None:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        storage.put(uri, file.read())


def leave(message: str) -> None:
    """End this process at once: what hangs cannot be asked to."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - the last word of this process
    os._exit(1)
