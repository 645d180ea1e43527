"""JPEGs decoded by the GPU that trains (nvJPEG, through TorchCodec), and cropped, resized and changed there.

nvJPEG's pixels are not libjpeg-turbo's to the last bit, so nothing chooses this by itself, and before the first batch
some pictures are decoded in both ways. Draws, crops and order are those of the threads.
"""

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from scalecv.errors import ConfigError
from scalecv.jpeg import turbo
from scalecv.schema import Batch

MOST_OFF = 2.0
"""Levels of 255 that a picture may be off on average; TorchVision's tests allow nvJPEG the same."""
COMPARED = 8
"""Pictures that are decoded in both ways."""
THREADS = 2
"""One prepares the next pictures while another waits for the GPU."""


def hindrance(how: Pixels, device: torch.device) -> str:
    """Why the GPU cannot decode, or nothing."""
    if device.type != "cuda":
        return "this process trains on the CPU"
    if importlib.util.find_spec("torchcodec") is None:
        return "TorchCodec is not there (pip install 'scalecv[gpu]')"
    if how.size_px is None or not is_plain(how) or how.mask_values:
        return "it does so for photographs of three colours with labels and data.size_px"
    return ""


class Made(NamedTuple):
    """Pictures on the device."""

    images: torch.Tensor
    """uint8 [N, 3, size_px, size_px], channels_last."""
    failed: list[int]
    """Of these, nothing was decoded."""
    event: Any
    """Passed by the GPU once they are there; None on a CPU."""
    took: float
    """Seconds of a thread."""


class GpuDecoder:
    """Decodes on one device, for all epochs of a feed."""

    def __init__(self, how: Pixels, device: torch.device) -> None:
        self.notes: list[str] = []
        """What was found; taken by whoever tells it."""
        self._how, self._device = how, device
        self._own = threading.local()
        self._lock = threading.Lock()
        self._is_compared = self._has_failed = False

    def takes(self, row: Row) -> turbo.Header | None:
        """The header of a picture that the GPU is given; None for one that threads decode."""
        known = turbo.header(row.image) if row.mask is None and row.nodata is None else None
        return known if known is not None and known.channels == 3 else None

    def first(self, rows: Sequence[Row], known: Sequence[turbo.Header], seeds: tuple[int, int] | None) -> Made:
        """As `make`; some pictures of the first batch are decoded by the CPU, too.

        Raises: ConfigError: the pixels are others.
        """
        with self._lock:  # no batch is given out before
            if rows and not self._is_compared:
                self._compare(rows[:COMPARED], known[:COMPARED])
                self._is_compared = True
        made = self.make(rows, known, seeds)
        if made.failed and not self._has_failed:
            self._has_failed = True
            self.notes.append(f"data.decode=gpu: it did not decode {rows[made.failed[0]].path} or more: threads do")
        return made

    def make(self, rows: Sequence[Row], known: Sequence[turbo.Header], seeds: tuple[int, int] | None) -> Made:
        """Decode, cut, resize and change some pictures; `seeds` as for `collate.fill`."""
        began, how, side = time.perf_counter(), self._how, self._how.size_px or 0
        chances = [None if seeds is None else transforms.draws(*seeds, row.id, row.draw) for row in rows]
        with torch.no_grad(), self._stream() as event:
            pictures = self._decoded([row.image for row in rows])
            wide = torch.zeros((len(rows), 3, side, side), device=self._device)
            wide = wide.contiguous(memory_format=torch.channels_last)
            flipped: dict[int, list[int]] = {-1: [], -2: []}
            for at, (picture, header, u) in enumerate(zip(pictures, known, chances, strict=True)):
                if picture is None:
                    continue
                (top, left, height, width), flips = box_and_flips(header, how, u)
                part = picture[None, :, top : top + height, left : left + width].float()
                wide[at] = functional.interpolate(part, (side, side), mode="bilinear", antialias=True)[0]
                flipped[-1] += [at] * (flips & 1)
                flipped[-2] += [at] * (flips >> 1)
            images = in_dtype(wide, torch.uint8)
            for dim, some in flipped.items():
                if some:
                    which = torch.tensor(some, device=self._device)
                    images[which] = images[which].flip(dim)
            rest = rest_of(how.augment)
            if rest != NOTHING:
                for at, u in enumerate(chances):
                    images[at] = augmented(images[at], rest, how, u)
            if event is not None:
                event.record()
        failed = [at for at, picture in enumerate(pictures) if picture is None]
        return Made(images, failed, event, time.perf_counter() - began)

    def _compare(self, rows: Sequence[Row], known: Sequence[turbo.Header]) -> None:
        made = self.make(rows, known, None)
        if made.event is not None:
            made.event.synchronize()
        with ThreadPoolExecutor(1) as pool:
            here = fill([*rows], self._how, None, pool, 1).wait()[0]["image"]
        good = [at for at in range(len(rows)) if at not in made.failed]
        off = (made.images.cpu().float() - here.float()).abs().mean((1, 2, 3)).tolist()
        for at in good:
            if off[at] > MOST_OFF:
                raise ConfigError(
                    f"data.decode=gpu: {rows[at].where}, {rows[at].path}: the GPU's pixels are off those of the CPU by "
                    f"{off[at]:.1f} of 255 on average, at most {MOST_OFF:g} is taken for the same picture: set "
                    "data.decode=trainer, and try another driver or release of TorchCodec"
                )
        if good:
            mean = sum(off[at] for at in good) / len(good)
            self.notes.append(
                f"data.decode=gpu: the GPU decodes JPEGs; its pixels of {len(good)} pictures are off those of the CPU "
                f"by {mean:.2f} of 255 on average"
            )

    @contextmanager
    def _stream(self) -> Iterator[Any]:
        """A stream of this thread, so that training's steps do not wait for pictures; its event, None on a CPU."""
        if self._device.type != "cuda":
            yield None
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(self._own.stream):
            yield torch.cuda.Event()  # type: ignore[no-untyped-call]

    def _decoded(self, files: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Pictures, uint8 [3, H, W]; None where the GPU cannot, such as for want of memory."""
        from torchcodec.decoders import decode_jpeg

        if not files:
            return []
        try:
            return list(decode_jpeg([*files], mode="RGB", device=self._device))
        except RuntimeError:  # of a list nothing comes back where one of it fails
            return [picture for file in files for picture in self._decoded([file])] if len(files) > 1 else [None]


class OnGpu:
    """A batch of which the GPU decodes the JPEGs and threads the rest."""

    def __init__(
        self,
        gpu: GpuDecoder,
        pool: ThreadPoolExecutor,
        here: Callable[[list[Row]], Filling],
        rows: list[Row],
        how: Pixels,
        seeds: tuple[int, int] | None,
    ) -> None:
        """Begin.

        Args:
            gpu, pool: the decoder, and threads for it.
            here: begins rows by the threads of the CPU, with the same draws.
            rows, how, seeds: as for `collate.fill`.
        """
        self._rows, self._how, self._here = rows, how, here
        known = {at: header for at, row in enumerate(rows) if (header := gpu.takes(row)) is not None}
        self._places = [*known]
        self._made = pool.submit(gpu.first, [rows[at] for at in known], [*known.values()], seeds)
        self._rest = [at for at in range(len(rows)) if at not in known]
        self._filling = here([rows[at] for at in self._rest]) if self._rest else None

    def wait(self) -> tuple[Batch, float]:
        """As `Filling.wait`; the image is on the device."""
        made = self._made.result()
        images, took = made.images, made.took
        if made.event is not None:
            now = torch.cuda.current_stream(images.device)
            now.wait_event(made.event)
            images.record_stream(now)
        by_threads = [(self._rest, self._filling)] if self._filling else []
        if made.failed:
            failed = [self._places[at] for at in made.failed]
            by_threads.append((failed, self._here([self._rows[at] for at in failed])))
        if by_threads:
            whole = images.new_empty((len(self._rows), *images.shape[1:])).contiguous(memory_format=torch.channels_last)
            whole[self._places] = images
            for places, filling in by_threads:
                some, seconds = filling.wait()
                whole[places] = some["image"].to(images.device)
                took += seconds
            images = whole
        batch: Batch = {
            "image": images,
            "id": [row.id for row in self._rows],
            "path": [row.path for row in self._rows],
        }
        labels = labels_of(self._rows, self._how)
        if labels is not None:
            batch["label"] = torch.from_numpy(labels)
        return batch, took
