"""How glibc's allocator treats this process; what the user has set in the environment stays."""

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Options of glibc's mallopt."""
MOST_KEPT = 2**31 - 1
"""Largest value that mallopt takes."""
MOST_HEAPS = 8
"""A container of two cores may see all of its machine."""


def keep_freed() -> bool:
    """Let this process keep memory that it has freed, for the next step; whether the system does so.

    glibc gives each block above 32 MB back to the kernel at once, which then hands out pages of zeros again: a step on
    large images spent a third of its time in that. Threads other than the main one keep blocks up to 64 MB only.
    """
    return _set(M_MMAP_THRESHOLD, MOST_KEPT) and _set(M_TRIM_THRESHOLD, MOST_KEPT)


def few_heaps() -> bool:
    """Let threads share one heap for each core, and 8 at most, instead of 8 for each; whether the system does so.

    A thread that waits for a bucket most of the time leaves what it freed in a heap of its own: 32 of them held 90 MB.
    """
    return _set(M_ARENA_MAX, min(MOST_HEAPS, max(2, os.cpu_count() or 1)))


def _set(option: int, value: int) -> bool:
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(option, value))
    return False
