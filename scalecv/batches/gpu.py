"""JPEGs decoded by the GPU that trains (nvJPEG, through TorchCodec), and cropped, resized and changed there.

nvJPEG's pixels are not libjpeg-turbo's, so nothing chooses this by itself, and some pictures of the first batch are
made in both ways. Draws, crops and order are those of the threads, which decode what the GPU does not.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from scalecv.batches import transforms
from scalecv.batches.collate import (
    NOTHING,
    Filling,
    Row,
    augmented,
    box_and_flips,
    fill,
    is_plain,
    labels_of,
    rest_of,
)
from scalecv.batches.pixels import Pixels
from scalecv.batches.radiometry import in_dtype
from scalecv.config import Augment
from scalecv.errors import ConfigError
from scalecv.jpeg import turbo
from scalecv.schema import Batch

MOST_OFF = 10.0
"""Levels of 255 that a picture may be off on average. nvJPEG enlarges colours by the nearest pixel where libjpeg-turbo
interpolates: 4 levels on average in flat colours of 64 px with 4:2:0, and none with 4:4:4. Colours in another order, or
another picture, are off by tens."""
COMPARED = 8
"""Pictures that are made in both ways."""
THREADS = 2
"""One prepares the next pictures while another waits for the GPU."""
CHUNK_BYTES = 256 << 20
"""Of decoded pictures, at a time in each thread."""
MOST_SHRUNK = 90
"""Times that a side may shrink: for more, CUDA's antialiased resize has not the memory that a block shares."""
_HEAD_BYTES = 1 << 16
_MOST_SAID = 3
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
    if tuple(map(int, found.split(".")[:2])) < LEAST_VERSION:
        return f"TorchCodec {found} is too old (pip install 'scalecv[gpu]')"
    return ""


class Job(NamedTuple):
    """A picture that the GPU makes."""

    row: Row
    header: turbo.Header
    box: transforms.Box
    flips: int
    chances: np.ndarray | None


class GpuDecoder:
    """Decodes on one device, for all epochs of a feed."""

    def __init__(self, how: Pixels, device: torch.device) -> None:
        self.tell: Callable[[str], None] = lambda note: None
        """Takes a note on what was found."""
        self.how, self.device = how, device
        self._streams: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_compared = self._is_given_up = False
        self._left, self._said = set[str](), set[str]()
        """Ids of rows that nvJPEG did not decode, and what it said."""
        self._notes = threading.Lock()

    def job(self, row: Row, seeds: tuple[int, int] | None) -> Job | None:
        """What the GPU makes of a row; None for one that threads decode. `seeds`: as for `collate.fill`."""
        if self._is_given_up or row.id in self._left or row.mask is not None or row.nodata is not None:
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
        Returns: uint8 [B, 3, size_px, size_px] on the device, channels_last; the event that the GPU passes once they
            are there (None on a CPU); seconds of threads.
        Raises: ConfigError: what the GPU makes are other pictures.
        """
        began = time.perf_counter()
        with self._lock:  # no batch is given out before
            if jobs and not self._is_compared:
                self._compare([*jobs.values()][:COMPARED], seeds)
                self._is_compared = True
        with torch.no_grad(), self._stream() as event:
            images = self._images(len(rows))
            try:
                failed = self._make(jobs, images)
            except torch.OutOfMemoryError as error:  # the network's memory comes first
                failed = [*jobs]
                self._leave(rows[failed[0]], error)
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
        side = self.how.size_px or 0
        images = torch.zeros((count, 3, side, side), dtype=torch.uint8, device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def _make(self, jobs: dict[int, Job], images: torch.Tensor) -> list[int]:
        """Put pictures into their places; the places of which nothing was decoded."""
        failed: list[int] = []
        for some in _chunks(jobs):
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

    def _compare(self, jobs: Sequence[Job], seeds: tuple[int, int] | None) -> None:
        """Make some pictures here, too: their crops, without what else is changed."""
        crops = Augment(**{name: getattr(self.how.augment, name) for name in ("resized_crop", "hflip", "vflip")})
        plain = GpuDecoder(replace(self.how, augment=crops), self.device)
        with torch.no_grad(), self._stream():
            images = plain._images(len(jobs))
            failed = plain._make(dict(enumerate(jobs)), images)
            there = images.cpu().float()
        good = [at for at in range(len(jobs)) if at not in failed]
        if not good:
            self._is_given_up = True
            why = "; ".join(sorted(plain._said))[:300]
            self.tell(f"data.decode=gpu: it decoded none of {len(jobs)} pictures ({why}): threads decode")
            return
        rows = [job.row for job in jobs]
        with ThreadPoolExecutor(1) as pool:
            off = (there - fill(rows, plain.how, seeds, pool, 1).wait()[0]["image"].float()).abs()
        means = off.mean((1, 2, 3)).tolist()
        for at in good:
            if means[at] > MOST_OFF:
                raise ConfigError(
                    f"data.decode=gpu: {rows[at].where}, {rows[at].path}: the GPU's pixels are off those of the CPU by "
                    f"{means[at]:.1f} of 255 on average, at most {MOST_OFF:g} is taken for the same picture: set "
                    "data.decode=trainer, and try another driver or release of TorchCodec"
                )
        self.tell(
            f"data.decode=gpu: the GPU decodes JPEGs; {len(good)} crops are off those of the CPU by "
            f"{sum(means[at] for at in good) / len(good):.2f} of 255 on average, {float(off[good].max()):.0f} at most"
        )

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
        """Pictures, uint8 [3, H, W]; None for what the GPU does not decode, which is told and not tried again."""
        from torchcodec.decoders import decode_jpeg

        try:
            found = decode_jpeg([job.row.image for job in jobs], mode="RGB", device=self.device)
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
        said, is_memory = _first_line(error), isinstance(error, torch.OutOfMemoryError)
        with self._notes:
            if not is_memory:  # which may be there another time
                self._left.add(row.id)
            is_new = said not in self._said and len(self._said) < _MOST_SAID
            self._said.add(said)
        if is_new:
            self.tell(f"data.decode=gpu: {row.path} or more are not decoded there ({said}): threads do")


def _chunks(jobs: dict[int, Job]) -> Iterator[list[int]]:
    """Places whose pictures are decoded at a time."""
    some: list[int] = []
    size = 0
    for at, job in jobs.items():
        more = 3 * job.header.height * job.header.width
        if some and size + more > CHUNK_BYTES:
            yield some
            some, size = [], 0
        some.append(at)
        size += more
    if some:
        yield some


def _says_colours(data: bytes) -> bool:
    """Whether a JPEG of three channels says that they are brightness and two colours, and not red, green and blue."""
    head = data[:_HEAD_BYTES]
    adobe = head.find(b"Adobe\0")
    if adobe >= 0:
        return head[adobe + 11 : adobe + 12] == b"\x01"
    return b"JFIF\0" in head or b"Exif\0" in head


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
        """As `Filling.wait`; the image is on the device."""
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
