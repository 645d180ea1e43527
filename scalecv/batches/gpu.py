"""JPEGs decoded by the GPU that trains (nvJPEG, through TorchCodec), and cropped, resized and changed there.

nvJPEG's pixels are not libjpeg-turbo's, so nothing chooses this by itself, and some pictures of the first batch are
made in both ways. Draws, crops and order are those of the threads, which decode what the GPU does not.
"""

import collections
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch.nn import functional

from scalecv.batches import transforms
from scalecv.batches.collate import (
    NOTHING,
    Filling,
    Row,
    augmented,
    box_and_flips,
    is_plain,
    labels_of,
    rest_of,
)
from scalecv.batches.gpu_likeness import Job, likeness
from scalecv.batches.pixels import Pixels
from scalecv.batches.radiometry import in_dtype
from scalecv.config import Augment
from scalecv.jpeg import turbo
from scalecv.schema import Batch

COMPARED = 8
"""Pictures that are made in both ways."""
THREADS = 2
"""One prepares the next pictures while another waits for the GPU."""
CHUNK_BYTES = 256 << 20
"""Of decoded pictures and what is made of them, at a time in each thread."""
_NO_MEMORY = re.compile(r"failed: 5\b|Failed to (create|initialize) nvjpeg")
MOST_SHRUNK = 90
"""Times that a side may shrink: for more, CUDA's antialiased resize has not the memory that a block shares."""
_HEAD_BYTES = 1 << 16
_MOST_SAID, _TRIES = 3, 2
LEAST_VERSION = (0, 17)
"""Of TorchCodec: 0.16 wrote into memory that kernels still read (meta-pytorch/torchcodec, pull request 1634)."""


def hindrance(how: Pixels, device: torch.device) -> str:
    """Why the GPU cannot decode, or nothing."""
    if device.type != "cuda":
        return "this process trains on the CPU"
    if how.size_px is None or not is_plain(how) or how.mask_values:
        return "it does so for photographs of three colours with labels and data.size_px"
    try:
        import torchcodec.decoders  # noqa: F401 - its libraries are those of one CUDA

        found = version("torchcodec")
    except (ImportError, OSError, RuntimeError) as error:
        return f"TorchCodec does not load (pip install 'scalecv[gpu]'): {_first_line(error)}"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < LEAST_VERSION:
        return f"TorchCodec {found} is too old (pip install 'scalecv[gpu]')"
    return ""


class GpuDecoder:
    """Decodes on one device, for all epochs of a feed."""

    def __init__(self, how: Pixels, device: torch.device) -> None:
        self.tell: Callable[[str], None] = lambda note: None
        """Takes a note on what was found."""
        self.how, self.device = how, device
        self._streams: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_compared = self._is_given_up = self._lacked = False
        self._failures, self._said = collections.Counter[str](), set[str]()
        """Id of a row -> how often nvJPEG did not decode it; and what it said."""
        self._notes = threading.Lock()

    def job(self, row: Row, seeds: tuple[int, int] | None) -> Job | None:
        """What the GPU makes of a row; None for one that threads decode. `seeds`: as for `collate.fill`."""
        if self._is_given_up or self._failures[row.id] >= _TRIES or row.mask is not None or row.nodata is not None:
            return None
        known = turbo.header(row.image)
        if known is None or known.channels != 3 or not _says_colours(row.image):
            return None
        u = None if seeds is None else transforms.draws(*seeds, row.id, row.draw)
        box, flips = box_and_flips(known, self.how, u)
        return Job(row, known, box, flips, u) if max(box[2:]) <= MOST_SHRUNK * (self.how.size_px or 0) else None

    def batch(
        self,
        rows: list[Row],
        jobs: dict[int, Job],
        seeds: tuple[int, int] | None,
        others: tuple[list[int], Filling] | None,
        here: Callable[[list[Row]], Filling],
    ) -> tuple[torch.Tensor, Any, float]:
        """The pictures of a batch; runs in a thread of its own, on a stream of its own.

        Args:
            rows: of the batch.
            jobs: place -> a picture for the GPU.
            seeds: as for `collate.fill`.
            others: places that threads fill already, and what they fill.
            here: begins further rows by these threads.
        Returns: uint8 [B, 3, size_px, size_px], channels_last, on the device, or in the host's memory where the device
            has none; the event that the GPU passes once they are there (None without); seconds of threads.
        Raises: ConfigError: what the GPU makes are other pictures.
        """
        began = time.perf_counter()
        try:
            with self._lock:  # no batch is given out before
                if jobs and not self._is_compared:
                    self._is_compared = self._compare([*jobs.values()][:COMPARED], seeds)
            if not jobs or (self._is_compared and not self._is_given_up):
                return self._on_device(rows, jobs, others, here, began)
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
            self._say(rows[0], error)  # the network's memory comes first
        some, took = here(rows).wait()
        return some["image"], None, took + time.perf_counter() - began

    def _on_device(
        self,
        rows: list[Row],
        jobs: dict[int, Job],
        others: tuple[list[int], Filling] | None,
        here: Callable[[list[Row]], Filling],
        began: float,
    ) -> tuple[torch.Tensor, Any, float]:
        with torch.no_grad(), self._stream() as event:
            images = self._images(len(rows))
            failed = self._make(jobs, images)
            took = time.perf_counter() - began
            parts = [others] if others else []
            if failed:
                parts.append((failed, here([rows[at] for at in failed])))
            for places, filling in parts:
                some, seconds = filling.wait()
                took += seconds
                pixels = some["image"].pin_memory() if event else some["image"]
                images[self._index(places)] = pixels.to(self.device, non_blocking=True)
            if event:
                event.record()
        return images, event, took

    def _images(self, count: int) -> torch.Tensor:
        shape = (count, 3, self.how.size_px or 0, self.how.size_px or 0)
        return torch.empty(shape, dtype=torch.uint8, device=self.device, memory_format=torch.channels_last)

    def _make(self, jobs: dict[int, Job], images: torch.Tensor) -> list[int]:
        """Put pictures into their places; the places of which nothing was decoded."""
        failed: list[int] = []
        for some in _chunks(jobs, self.how.size_px or 0):
            failed += self._put(jobs, dict(zip(some, self._decoded([jobs[at] for at in some]), strict=True)), images)
        return failed

    def _put(self, jobs: dict[int, Job], found: dict[int, torch.Tensor | None], images: torch.Tensor) -> list[int]:
        made = [(at, picture) for at, picture in found.items() if picture is not None]
        if not made:
            return [*found]
        how, side = self.how, self.how.size_px or 0
        wide = torch.empty((len(made), 3, side, side), device=self.device)
        flipped: dict[int, list[int]] = {-1: [], -2: []}
        for number, (at, picture) in enumerate(made):
            (top, left, height, width), flips = jobs[at].box, jobs[at].flips
            part = picture[None, :, top : top + height, left : left + width].float()
            wide[number] = functional.interpolate(part, (side, side), mode="bilinear", antialias=True)[0]
            flipped[-1] += [number] * (flips & 1)
            flipped[-2] += [number] * (flips >> 1)
        changed = in_dtype(wide, torch.uint8)
        for dim, some in flipped.items():
            if some:
                which = self._index(some)
                changed[which] = changed[which].flip(dim)
        rest = rest_of(how.augment)
        if rest != NOTHING:
            for number, (at, _) in enumerate(made):
                changed[number] = augmented(changed[number], rest, how, jobs[at].chances)
        images[self._index([at for at, _ in made])] = changed
        return [at for at, picture in found.items() if picture is None]

    def _index(self, places: Sequence[int]) -> torch.Tensor:
        return torch.tensor(places, dtype=torch.int64, device=self.device)

    def _compare(self, jobs: Sequence[Job], seeds: tuple[int, int] | None) -> bool:
        """Make some pictures here, too: their crops, without what else is changed.

        Returns: whether something could be compared, or the GPU is known to decode nothing.
        Raises: ConfigError: the pictures are others. RuntimeError: memory lacks.
        """
        crops = Augment(**{name: getattr(self.how.augment, name) for name in ("resized_crop", "hflip", "vflip")})
        plain = GpuDecoder(replace(self.how, augment=crops), self.device)
        with torch.no_grad(), self._stream():
            images = plain._images(len(jobs))
            failed = plain._make(dict(enumerate(jobs)), images)
            good = [at for at in range(len(jobs)) if at not in failed]
            there = images[plain._index(good)].cpu().float()
        if not good:
            if len(jobs) == COMPARED and not plain._lacked:
                self._is_given_up = True
                why = "; ".join(sorted(plain._said))[:300]
                self.tell(f"data.decode=gpu: it decoded none of {len(jobs)} pictures ({why}): threads decode")
            self._failures += plain._failures
            return self._is_given_up
        self.tell(likeness(there, [jobs[at] for at in good], plain.how, seeds))
        return True

    @contextmanager
    def _stream(self) -> Iterator[Any]:
        """One of few streams, so that training's steps do not wait for pictures; its event, None on a CPU.

        Memory is kept for each stream apart, so they are used again and again.
        """
        if self.device.type != "cuda":
            yield None
            return
        try:
            stream = self._streams.get_nowait()
        except queue.Empty:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                yield torch.cuda.Event()  # type: ignore[no-untyped-call]
        finally:
            self._streams.put(stream)

    def _decoded(self, jobs: Sequence[Job]) -> list[torch.Tensor | None]:
        """Pictures, uint8 [3, H, W]; None for what the GPU does not decode, which is told and tried twice."""
        from torchcodec.decoders import decode_jpeg

        try:
            # No bytes: for these TorchCodec switches warnings of the process off and on, in several threads at a time.
            files = [torch.frombuffer(bytearray(job.row.image), dtype=torch.uint8) for job in jobs]
            found = decode_jpeg(files, mode="RGB", device=self.device)
        except RuntimeError as error:  # of a list nothing comes back where one of it fails
            if len(jobs) > 1:
                middle = len(jobs) // 2
                return [*self._decoded(jobs[:middle]), *self._decoded(jobs[middle:])]
            self._leave(jobs[0].row, error)
            return [None]
        pictures: list[torch.Tensor | None] = []
        for picture, (row, header, *_) in zip(found, jobs, strict=True):
            is_it = picture.shape == (3, header.height, header.width)
            pictures.append(picture if is_it else None)
            if not is_it:
                self._leave(row, ValueError(f"{[*picture.shape]} for a picture of {header.width}x{header.height} px"))
        return pictures

    def _leave(self, row: Row, error: Exception) -> None:
        if _lacks_memory(error):  # which may be there another time
            self._lacked = True
        else:
            self._failures[row.id] += 1
        self._say(row, error)

    def _say(self, row: Row, error: Exception) -> None:
        said = _first_line(error)
        with self._notes:
            is_new = said not in self._said and len(self._said) < _MOST_SAID
            self._said.add(said)
        if is_new:
            self.tell(f"data.decode=gpu: {row.path} or more are not decoded there ({said}): threads do")


def _lacks_memory(error: Exception) -> bool:
    """Whether the device's memory did not suffice: TorchCodec says so in words, nvJPEG by a number."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or bool(_NO_MEMORY.search(said))


def _chunks(jobs: dict[int, Job], side: int) -> Iterator[list[int]]:
    """Places whose pictures are decoded at a time; beside each lies what is made of it, in float32 and in bytes."""
    some: list[int] = []
    size = 0
    for at, job in jobs.items():
        more = 3 * job.header.height * job.header.width + 15 * side * side
        if some and size + more > CHUNK_BYTES:
            yield some
            some, size = [], 0
        some.append(at)
        size += more
    if some:
        yield some


def _says_colours(data: bytes) -> bool:
    """Whether a JPEG of three channels says that they are brightness and two colours, and not red, green and blue."""
    adobe = data.find(b"Adobe\0", 0, _HEAD_BYTES)
    if adobe >= 0:
        return data[adobe + 11 : adobe + 12] == b"\x01"
    return any(data.find(mark, 0, _HEAD_BYTES) >= 0 for mark in (b"JFIF\0", b"Exif\0"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:160]}" if lines else type(error).__name__


class OnGpu:
    """A batch of which the GPU decodes the JPEGs and threads the rest."""

    def __init__(
        self,
        gpu: GpuDecoder,
        pool: ThreadPoolExecutor,
        here: Callable[[list[Row]], Filling],
        rows: list[Row],
        seeds: tuple[int, int] | None,
    ) -> None:
        """Begin.

        Args:
            gpu, pool: the decoder, and threads for it.
            here: begins rows by the threads of the CPU, with the same draws.
            rows, seeds: as for `collate.fill`.
        """
        self._rows, self._how = rows, gpu.how
        jobs = {at: job for at, row in enumerate(rows) if (job := gpu.job(row, seeds)) is not None}
        rest = [at for at in range(len(rows)) if at not in jobs]
        others = (rest, here([rows[at] for at in rest])) if rest else None
        self._made = pool.submit(gpu.batch, rows, jobs, seeds, others, here)

    def wait(self) -> tuple[Batch, float]:
        """As `Filling.wait`; the image is on the device, where that has room."""
        images, event, took = self._made.result()
        if event:
            now = torch.cuda.current_stream(images.device)
            now.wait_event(event)
            images.record_stream(now)
        batch: Batch = {
            "image": images,
            "id": [row.id for row in self._rows],
            "path": [row.path for row in self._rows],
        }
        labels = labels_of(self._rows, self._how)
        if labels is not None:
            batch["label"] = torch.from_numpy(labels)
        return batch, took
