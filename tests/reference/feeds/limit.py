"""The limit: as many threads as workers, each in C all the time, over bytes that lie in memory (see limit.c)."""

import ctypes
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.feeds.work import SIDE, Epochs, Work

FORMATS = ("packed",)
SOURCE = Path(__file__).with_name("limit.c")


def build(folder: Path) -> str:
    """Compile limit.c; "" if that worked, otherwise why there is no limit on this machine."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "there is no C compiler"
    target = folder / "limit.so"
    if target.exists() and target.stat().st_mtime > SOURCE.stat().st_mtime:
        return ""
    options = ["-O3", "-march=native", "-shared", "-fPIC"]
    command = [compiler, *options, str(SOURCE), "-o", str(target), "-ljpeg", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr[-400:] if done.returncode else ""


class Crop:
    """limit.c as a function of whole batches; the GIL is free meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._call = ctypes.CDLL(str(folder / "limit.so")).crop_images
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._call.argtypes = [pointer, pointer, number, pointer, number, pointer, pointer]

    def __call__(self, starts: np.ndarray, sizes: np.ndarray, draws: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Decode the images at the addresses `starts` (uint64) into `out`; their boxes x, y, width, height, int32."""
        boxes = np.empty((len(starts), 4), np.int32)
        places = [a.ctypes.data for a in (starts, sizes, draws, boxes, out)]
        bad = self._call(places[0], places[1], len(starts), places[2], SIDE, places[3], places[4])
        if bad:
            raise RuntimeError(f"{bad} of {len(starts)} images could not be decoded")
        return boxes


def open_feed(work: Work) -> Epochs:
    crop = Crop(Path(work.data))
    folder = Path(work.place("packed"))
    packed = np.memmap(folder / "bytes.bin", np.uint8, "r")
    ends = np.load(folder / "ends.npy").astype(np.uint64)
    sizes = np.diff(ends, prepend=np.uint64(0))
    starts = ends - sizes + np.uint64(packed.ctypes.data)
    buffers = [np.empty((work.batch, SIDE, SIDE, 3), np.uint8) for _ in range(2 * work.workers + 1)]

    def epoch(number: int, memory: Any = packed) -> Iterator[tuple[Any, Any]]:  # keeps the addresses mapped
        order = np.random.default_rng(number).permutation(work.images)
        todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for first in range(0, len(order), work.batch):
            todo.put((first, order[first : first + work.batch]))
        steps = todo.qsize()
        for buffer in buffers:
            free.put(buffer)

        def decode() -> None:
            try:
                while True:
                    first, numbers = todo.get_nowait()
                    draws = np.random.default_rng((number, first)).random((len(numbers), 5))
                    buffer = free.get()
                    crop(starts[numbers], sizes[numbers], draws, buffer)
                    done.put((buffer, numbers))
            except queue.Empty:
                return
            except BaseException as error:
                done.put(error)

        threads = [threading.Thread(target=decode, daemon=True) for _ in range(work.workers)]
        for thread in threads:
            thread.start()
        for _ in range(steps):
            item = done.get()
            if isinstance(item, BaseException):
                raise item
            buffer, numbers = item
            yield buffer[: len(numbers)], numbers
            free.put(buffer)

    return epoch
