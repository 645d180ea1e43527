"""What a tree of processes has used: CPU time, and memory by proportional share."""

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Processes below this one whose parents end become its children, so that none leaves the tree."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def tree(root: int) -> dict[int, float]:
    """Process -> CPU seconds of itself and of its children that have ended, for a process and all below it."""
    parents: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / _TICKS_PER_S)
    found = {root: parents[root][1]} if root in parents else {}
    grown = True
    while grown:
        below = {pid: cpu_s for pid, (parent, cpu_s) in parents.items() if parent in found and pid not in found}
        grown = bool(below)
        found |= below
    return found


def cpu_s(root: int) -> float:
    """CPU seconds of a process, of all below it, and of those of them that have ended and were waited for."""
    return sum(tree(root).values())


def pss_mb(root: int) -> float:
    """Memory of the tree; what processes share counts once."""
    total = 0
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def end_below(root: int) -> None:
    """Kill all processes below this one."""
    for pid in tree(root):
        if pid != root:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Peak:
    """The largest memory of a tree, looked at each `every_s` from `begin` to the end of a `with`, 5 % of it at most.

    A process whose memory is looked at waits for each new page: it is not to be its first batch that waits.
    """

    def __init__(self, root: int) -> None:
        self.mb, self.every_s = 0.0, 0.25
        self._root, self._stop = root, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Peak":
        return self

    def begin(self) -> None:
        """Begin to look; a further call does nothing."""
        if not self._thread.ident:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def _look(self) -> None:
        cost_s = 0.0
        while not self._stop.wait(max(self.every_s, 19 * cost_s)):
            began = time.thread_time()
            self.mb = max(self.mb, pss_mb(self._root))
            cost_s = time.thread_time() - began
