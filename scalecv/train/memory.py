"""What is left of memory, and what a piece of work takes of it. Of the host, Linux tells; other systems do not."""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that may still be taken: the least of the machine's and of what each control group above leaves.

    Args:
        proc: where the kernel tells about processes.
        groups: where it tells about control groups, of version 1 or 2.
    Returns: infinity where nothing is known.
    """
    found = [_of_machine(proc)]
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                top = groups if controllers == "" else groups / "memory"
                below = top / path.lstrip("/")
                found += [_of_group(one) for one in (below, *below.parents) if one == top or top in one.parents]
    return min(found)


def give_back() -> None:
    """Let go of what a run left behind, in a process that goes on with others; the peak begins anew."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def growth(work: Callable[[], object]) -> float | None:
    """Bytes by which this process grew at its largest during `work`; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed, but not given back, hides what is taken
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (OSError, AttributeError, StopIteration):
        work()
        return None
    work()
    return max(0.0, _status("VmHWM") - before)


def peak_mb(device: str) -> float | None:
    """Most memory of this process so far, in 1e6 bytes; None where the system does not tell.

    On a GPU what torch held for tensors; on a CPU all that the process held, its libraries (about 600 MB) included.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    with suppress(OSError, StopIteration):
        return _status("VmHWM") / 1e6
    return None


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _of_machine(proc: Path) -> float:
    with suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float("inf")


def _of_group(folder: Path) -> float:
    """What one control group leaves; files that the kernel can drop at once do not count as taken."""
    names = ("memory.max", "memory.current", "inactive_file")
    if not (folder / names[0]).exists():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with suppress(OSError, ValueError):
        limit = float((folder / names[0]).read_text())  # "max" is no number: no limit
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - float((folder / names[1]).read_text()) + float(stat.get(names[2], 0))
    return float("inf")
