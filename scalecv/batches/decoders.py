"""Who decodes: threads of the training process, free CPUs of the cluster where training would wait, or the GPU.

The pixels of a row depend on its bytes and its draws alone, so it does not matter who makes them: a batch goes to the
threads while they have little to do, and else to a Ray task on any node. A task that does not answer in time, because
its node is gone or its CPU was taken, is done here again.
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from scalecv import raster
from scalecv.batches import crops
from scalecv.batches.collate import Filling, Row, fill
from scalecv.batches.gpu import THREADS, GpuDecoder, OnGpu
from scalecv.batches.memory import Blocks
from scalecv.batches.pixels import Pixels
from scalecv.batches.shared_pixels import SharedPixels
from scalecv.errors import IntegrityError
from scalecv.schema import Batch

LOCAL_BATCHES = 2
"""Batches that the threads have before others are given away."""
PATIENCE_S = 5.0
"""Seconds that a batch may be late before it is decoded here."""
ASK_AGAIN_S = 1.0
"""Seconds between two calls for processes of the cluster, while new ones answer."""
STAY_S = 0.05
"""A process that is called stays busy for so long, that others of the same call go to other processes."""
LOOK_S, LOOK_BATCHES, WAITS = 5.0, 10, 0.1
"""Training is looked at over so many seconds and batches; from this share of waiting on the cluster is asked."""


class Shared:
    """What the epochs of a feed have in common."""

    def __init__(self) -> None:
        self.blocks = Blocks()
        self.is_asked = False
        """Whether CPUs of the cluster were asked to decode."""
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._wanted, self._ask_at, self._in_vain = 0, 0.0, 0
        self._called, self._processes = list[Any](), set[tuple[str, int]]()
        self.trouble = ""
        """Why processes of the cluster could not get ready."""

    def once(self, about: str, note: str) -> list[str]:
        """The note, if no epoch before has given one about the same."""
        with self._lock:
            is_new = about not in self._said
            self._said.add(about)
        return [note] if is_new else []

    def ask(self, count: int) -> None:
        """Have processes of the cluster import what decoding needs: that takes seconds, which no batch waits for."""
        with self._lock:
            self.is_asked = True
            self._wanted = count
            self._call()

    def helpers(self) -> int:
        """Processes of the cluster that are ready to decode for this feed.

        A process that was ready early may take the call meant for one that starts yet: who has answered counts, not
        how often, and the rest is asked again, each time after twice as long while nobody new answers.
        """
        with self._lock:
            if self._called:
                self._listen()
            elif len(self._processes) < self._wanted and time.monotonic() >= self._ask_at:
                self._call()
            return min(len(self._processes), self._wanted)

    def lost(self) -> None:
        """Hear that a batch did not come back: which process is gone is not known, so all are asked again."""
        with self._lock:
            self._processes.clear()
            self._ask_at, self._in_vain = 0.0, 0

    def _call(self) -> None:
        """Call every process that is wanted, since none can be chosen."""
        self._called = [_task(_ready).remote() for _ in range(self._wanted)]

    def _listen(self) -> None:
        import ray

        done, self._called = ray.wait(self._called, num_returns=len(self._called), timeout=0)
        before = len(self._processes)
        for answer in done:
            try:
                self._processes.add(ray.get(answer))
            except ray.exceptions.RayError as error:
                self.trouble = str(error).strip().splitlines()[-1][:200]
        if len(self._processes) > before:
            self._in_vain = 0
        elif not self._called:
            self._in_vain = min(self._in_vain + 1, 8)
        if not self._called:
            self._ask_at = time.monotonic() + ASK_AGAIN_S * 2**self._in_vain


class Pending(Protocol):
    """A batch on its way."""

    def wait(self) -> tuple[Batch, float]:
        """The batch without `valid` and `position`, and the seconds it took to decode."""
        ...


class Decoders:
    """Decodes the batches of one feed; closing it ends the threads."""

    def __init__(
        self,
        how: Pixels,
        threads: int,
        mode: str,
        ranks: int,
        shared: Shared,
        pixels: SharedPixels | None = None,
        gpu: GpuDecoder | None = None,
    ) -> None:
        """Start the threads.

        Args:
            how: what pixels are wanted.
            threads: of this process.
            mode: trainer (threads alone), cluster, auto (the cluster once training waits) or gpu.
            ranks: that share the cluster's free CPUs.
            shared: what other epochs of the feed have chosen and kept.
            pixels: decoded images of this node, which the threads use; tasks elsewhere do not.
            gpu: what decodes JPEGs, if it is not the threads.
        """
        if pixels and mode == "auto":
            mode = "trainer"
        self.pixels = pixels
        self.how, self.threads, self.mode, self.ranks, self.shared = how, threads, mode, ranks, shared
        self.notes: list[str] = []
        """What was chosen and why; taken by whoever tells it."""
        self.given_away = 0
        """Batches that tasks decoded."""
        if pixels:
            self.notes += shared.once("pixels", pixels.told)
        self._pool = ThreadPoolExecutor(threads, "decode", initializer=raster.keep_settings)
        self._pool.submit(crops.load)  # while the first row groups are read
        self._gpu = gpu
        if gpu:
            gpu.tell = self.notes.append
        self._gpu_pool = ThreadPoolExecutor(THREADS, thread_name_prefix="gpu-decode")
        self._here, self._away = 0, 0
        self._since, self._waited, self._seen = time.perf_counter(), 0.0, 0
        if mode == "cluster" and not shared.is_asked:
            self._ask("data.decode=cluster")

    @property
    def helpers(self) -> int:
        """CPUs of the cluster that are ready to decode for this feed."""
        return self.shared.helpers()

    def _ask(self, why: str) -> None:
        free = free_cpus()
        if free:
            count = max(1, free // self.ranks)
            self.shared.ask(count)
            self.notes.append(f"{why}: {count} free CPUs of the cluster decode beside {self.threads} threads")
        elif self.mode == "cluster":
            self.notes += self.shared.once(
                "no CPU", f"{why}: no CPU of the cluster is free, {self.threads} threads decode here"
            )

    def start(self, rows: list[Row], seeds: tuple[int, int] | None) -> Pending:
        """Begin with a batch."""
        if self.shared.trouble:
            note = f"processes of the cluster could not get ready to decode: {self.shared.trouble}"
            self.notes += self.shared.once("trouble", note)
        if self._gpu:
            return OnGpu(self._gpu, self._gpu_pool, lambda some: self._fill(some, seeds), rows, seeds)
        if self._here >= LOCAL_BATCHES and self._away < self.helpers:
            self._away += 1
            return _Away(self, rows, seeds)
        self._here += 1
        return _Here(self, self._fill(rows, seeds))

    def waited(self, seconds: float) -> None:
        """Hear how long the consumer waited for a batch."""
        self._waited, self._seen = self._waited + seconds, self._seen + 1
        now = time.perf_counter()
        if now - self._since < LOOK_S or self._seen < LOOK_BATCHES:
            return
        share = self._waited / (now - self._since)
        self._since, self._waited, self._seen = now, 0.0, 0
        if self.mode == "auto" and not self.shared.is_asked and share > WAITS:
            self._ask(f"training waited {share:.0%} of the time for its images")

    def close(self) -> None:
        """End the threads."""
        for pool in (self._gpu_pool, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)
        if self.pixels:
            self.pixels.close()

    def here(self, rows: list[Row], seeds: tuple[int, int] | None) -> tuple[Batch, float]:
        """Decode a batch by the threads, now."""
        return self._fill(rows, seeds).wait()

    def _fill(self, rows: list[Row], seeds: tuple[int, int] | None) -> Filling:
        return fill(rows, self.how, seeds, self._pool, 2 * self.threads, self.shared.blocks, self.pixels)

    def done(self, *, here: bool) -> None:
        """A batch was taken."""
        if here:
            self._here -= 1
        else:
            self._away -= 1


class _Here:
    def __init__(self, decoders: Decoders, filling: Pending) -> None:
        self._decoders, self._filling = decoders, filling

    def wait(self) -> tuple[Batch, float]:
        try:
            return self._filling.wait()
        finally:
            self._decoders.done(here=True)


class _Away:
    def __init__(self, decoders: Decoders, rows: list[Row], seeds: tuple[int, int] | None) -> None:
        self._decoders, self._rows, self._seeds = decoders, rows, seeds
        self._answer = _task(_decode).remote(rows, decoders.how, seeds)

    def wait(self) -> tuple[Batch, float]:
        import ray

        try:
            ready, _ = ray.wait([self._answer], timeout=PATIENCE_S)
            if not ready:
                ray.cancel(self._answer)
                self._decoders.shared.lost()
                return self._decoders.here(self._rows, self._seeds)
            try:
                image, mask, label, took = ray.get(self._answer)
            except IntegrityError:
                raise
            except ray.exceptions.RayError:
                self._decoders.shared.lost()
                return self._decoders.here(self._rows, self._seeds)
            self._decoders.given_away += 1
        finally:
            self._decoders.done(here=False)
        batch: Batch = {
            "image": torch.from_numpy(image.copy()).permute(0, 3, 1, 2),  # Ray's memory can only be read
            "id": [row.id for row in self._rows],
            "path": [row.path for row in self._rows],
        }
        if mask is not None:
            batch["mask"] = torch.from_numpy(mask.copy())
        elif label is not None:
            batch["label"] = torch.from_numpy(label.copy())
        return batch, took


def free_cpus() -> int:
    """CPUs of the Ray cluster that nobody has reserved; 0 without one."""
    ray = sys.modules.get("ray")  # whoever runs on Ray has imported it
    return int(ray.available_resources().get("CPU", 0)) if ray and ray.is_initialized() else 0


@lru_cache(maxsize=2)
def _task(function: Any) -> Any:
    """A function as tasks of one CPU, on all nodes alike."""
    import ray

    return ray.remote(num_cpus=1, max_retries=2, scheduling_strategy="SPREAD")(function)


def _ready() -> tuple[str, int]:
    """What a process of the cluster does first, and which one it is: node and pid."""
    import ray

    crops.load()  # unpickling this function has imported this module
    time.sleep(STAY_S)
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _decode(
    rows: list[Row], how: Pixels, seeds: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, float]:
    """A batch in a task of one CPU: pixels [B, H, W, C], masks or labels, and the seconds it took."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1, initializer=raster.keep_settings) as pool:
        batch, took = fill(rows, how, seeds, pool, 1).wait()
    arrays: dict[str, Any] = {name: batch[name].numpy() for name in ("mask", "label") if name in batch}
    return batch["image"].permute(0, 2, 3, 1).numpy(), arrays.get("mask"), arrays.get("label"), took
