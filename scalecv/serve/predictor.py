"""A bundle at work: images in, logits out, and the one place where logits become a class."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from scalecv.artifacts.bundle import Bundle
from scalecv.batches import transforms
from scalecv.batches.collate import to_device
from scalecv.batches.samples import image_of
from scalecv.raster import Profile
from scalecv.shards.decode import BadImage
from scalecv.tasks import TASKS
from scalecv.tiles import Window, grid, stitch

MULTIPLE_PX = 32
"""Sides of what a segmentation network sees are filled up to a multiple of this."""
WHOLE_PX = 2048
"""A model that was trained on resized images resizes photographs up to this side too; larger ones are scenes."""
AT_ONCE_PX = 1 << 20
"""Pixels that go through the network together where no batch is given; 8 times as many on a GPU."""
TILE_PX = 512
"""Side of the windows of a scene for a model that was trained on native pixels."""

Read = Callable[[Window], NDArray[Any]]
"""Window -> pixels [h, w, bands]."""


@dataclass(frozen=True)
class Windows:
    """How scenes are cut for a network; all in pixels of the scene but for `seen_px`."""

    side_px: int
    overlap_px: int
    seen_px: int
    """Side of a window as the network sees it: at the scale that it was trained at."""
    whole_px: int
    """Images up to this side are resized as a whole, as those of training were; 0 where those were not."""
    placed_px: int
    """The same for images with a georeference: a larger one shows more ground, not the same ground larger."""

    def __str__(self) -> str:
        seen = f", which the network sees as {self.seen_px} px" if self.seen_px != self.side_px else ""
        return f"windows of {self.side_px} px, one every {self.side_px - self.overlap_px} px{seen}"


def windows_for(
    size_px: int | None, sides_px: tuple[int, int] | None, tile: int | None, overlap: int | None
) -> Windows:
    """How a model's scenes are cut.

    Args:
        size_px: side to which images were resized in training.
        sides_px: shortest and longest side of these images; where they differ, the scale is that of the geometric mean.
            None takes them to have been of `size_px`.
        tile, overlap: as of `scalecv.serve.predict.predict`.
    """
    if size_px is None:
        side = tile or TILE_PX
        seen, whole, placed = side, 0, 0
    else:
        trained = round(math.prod(sides_px) ** 0.5) if sides_px else size_px
        side = tile or trained
        seen = max(1, round(side * size_px / trained))
        whole = tile or max(WHOLE_PX, size_px, *(sides_px or ()))
        placed = min(whole, sides_px[1]) if sides_px else whole
    return Windows(side, side // 4 if overlap is None else overlap, seen, whole, placed)


@dataclass(frozen=True)
class Rows:
    """Some rows of a prediction."""

    row: int
    classes: NDArray[np.int64]
    """[n, W] place in the bundle's classes."""
    probability: NDArray[np.float32]
    """[K, n, W]."""
    missing: NDArray[np.bool_]
    """[n, W] where the image has no data."""


class Predictor:
    """A network with what its input needs."""

    def __init__(
        self, bundle: Bundle, device: torch.device, batch: int | None, tile: int | None, overlap: int | None
    ) -> None:
        """Args: as of `scalecv.serve.predict.predict`."""
        self.facts = bundle.facts
        self.task = TASKS[bundle.facts.task]
        self._how = bundle.pixels()
        self._model = bundle.model.to(device)
        self._device = device
        self._windows = windows_for(self._how.size_px, self._how.sides_px, tile, overlap)
        side = self._windows.seen_px if self.task.name == "segment" else self._how.size_px or TILE_PX
        side *= self.facts.factor
        self._batch = batch or max(1, min(64, (AT_ONCE_PX << 3 * (device.type == "cuda")) // side**2))

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Class int64 and probability float32, by the threshold that the bundle holds."""
        return self.task.predict(logits, self.facts.threshold)

    def check(self, profile: Profile) -> None:
        """Raises: BadImage: pixels of another kind than the model was trained on."""
        how = self._how
        needed = max(how.bands) if how.bands else how.channels
        if how.color == "native":
            fits = profile.dtype == how.source_dtype
            fits &= profile.bands >= needed if how.bands else profile.bands == needed
            wanted = f"{how.source_dtype} with {needed} bands"
        else:
            fits, wanted = profile.dtype in ("uint8", "uint16"), "photographs of 8 or 16 bits"
        if not fits:
            found = f"{profile.dtype} with {profile.bands} bands"
            raise BadImage("unsupported", f"{found}, the model was trained on {wanted}")

    def picture(self, pixels: NDArray[Any], nodata: float | None) -> Tensor:
        """A whole image [H, W, bands] as the network sees it, [C, H, W] in the dtype of a batch."""
        picture, _ = image_of(pixels, nodata, self._how)
        if self._how.size_px:
            picture, _ = transforms.resize(picture, None, self._how.size_px, self._how.resize)
        return picture

    def classify(self, pictures: Sequence[Tensor]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Class and probabilities [K] of each picture; those of one size go through the network together."""
        for some in _alike(pictures, self._batch):
            classes, probability = self.decide(self._logits(torch.stack(some)))
            yield from zip(classes.tolist(), probability.cpu().numpy(), strict=True)

    def segment(self, profile: Profile, read: Read) -> Iterator[Rows]:
        """The rows of one image, from the top to the bottom; of a scene, what is held is one row of windows.

        Raises: BadImage: as `read` does.
        """
        width, height = profile.width, profile.height
        if max(width, height) <= (self._windows.placed_px if profile.is_placed else self._windows.whole_px):
            values = self._values([read(Window(0, 0, height, width))], profile.nodata, is_whole=True)[0]
            yield self._rows(0, values)
            return
        for row, values in stitch(self._parts(profile, read), width, height, self._windows.overlap_px):
            yield self._rows(row, values)

    def _parts(self, profile: Profile, read: Read) -> Iterator[tuple[Window, NDArray[np.float32]]]:
        windows = grid(profile.width, profile.height, self._windows.side_px, self._windows.overlap_px)
        for some in _batches(windows, self._batch):
            values = self._values([read(window) for window in some], profile.nodata, is_whole=False)
            yield from zip(some, values, strict=True)

    def _values(self, pixels: Sequence[NDArray[Any]], nodata: float | None, is_whole: bool) -> NDArray[np.float32]:
        """Logits and, as the last channel, 1 where data is missing: [B, K + 1, h, w]."""
        pairs = [image_of(part, nodata, self._how) for part in pixels]
        pictures, shape = [picture for picture, _ in pairs], pixels[0].shape[:2]
        seen = self._seen(shape[0], shape[1], is_whole)
        if seen != shape:
            pictures = [transforms.scaled(picture, *seen) for picture in pictures]
        logits = self._logits(torch.stack(pictures))
        if logits.shape[-2:] != shape:
            logits = F.interpolate(logits, shape, mode="bilinear", align_corners=False)
        gone = [np.zeros(shape, np.float32) if m is None else m.astype(np.float32) for _, m in pairs]
        return np.concatenate([logits.cpu().numpy(), np.stack(gone)[:, None]], axis=1)

    def _seen(self, height: int, width: int, is_whole: bool) -> tuple[int, int]:
        """Height and width at which the network sees an image or a window."""
        if is_whole and self._how.size_px:
            return self._how.size_px, self._how.size_px
        scale = self._windows.seen_px / self._windows.side_px
        return max(1, round(height * scale)), max(1, round(width * scale))

    @torch.no_grad()
    def _logits(self, pictures: Tensor) -> Tensor:
        """float32 [B, K] or [B, K, h, w] of pictures [B, C, h, w]."""
        image = to_device({"image": pictures}, self._how, self._device, False)["image"]
        height, width = image.shape[-2:]
        if self.task.name != "segment":
            return self._model(image).float()  # type: ignore[no-any-return]
        below, right = (math.ceil(side / MULTIPLE_PX) * MULTIPLE_PX - side for side in (height, width))
        image = F.pad(image, (0, right, 0, below), mode="replicate")
        return self._model(image).float()[..., :height, :width]  # type: ignore[no-any-return]

    def _rows(self, row: int, values: NDArray[np.float32]) -> Rows:
        classes, probability = self.decide(torch.from_numpy(values[None, :-1]))
        return Rows(row, classes[0].numpy(), probability[0].numpy(), values[-1] > 0.5)


def _alike(pictures: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    held: list[Tensor] = []
    for picture in pictures:
        if held and (held[0].shape != picture.shape or len(held) >= most):
            yield held
            held = []
        held.append(picture)
    if held:
        yield held


def _batches(windows: Iterable[Window], most: int) -> Iterator[tuple[Window, ...]]:
    left = iter(windows)
    while some := tuple(islice(left, most)):
        yield some
