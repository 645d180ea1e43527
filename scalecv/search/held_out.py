"""What candidates say of the validation split, kept on disk, and how good the mean of some of them is.

    bundle ──▶ answers: probabilities of each row, once ──▶ score of any mean on the rows that choose
                                                        └─▶ confusion of each row that checks

Rows are split in halves by a hash of their id: one half chooses members, weights and threshold, the other one checks.
Tiles of one scene are in the same half, and count as one where the gain is judged, if there are enough scenes.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scalecv.artifacts.bundle import PixelFacts
from scalecv.batches.collate import to_device
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import Pixels
from scalecv.errors import ConfigError, DataError, nearest
from scalecv.metrics import binned
from scalecv.metrics.confusion import confusion
from scalecv.metrics.paired import LEAST_UNITS
from scalecv.schema import IGNORE
from scalecv.shards.store import Dataset
from scalecv.tasks.rows import scene_of
from scalecv.tasks.task import Task, is_cost

SPLIT = "val"
MOST_VALUES = 1 << 25
"""Probabilities that are kept of each candidate; rows beyond them are left out, by a hash of their id."""
AT_ONCE = 1 << 22
"""Probabilities that are in memory at once."""
LEVELS = 1 << 16
"""Steps in which probabilities of two classes are told apart while members are chosen: 34 ns for each, and 140 in the
bins that thresholds come from."""
FEWEST_ROWS = 2

Mean = Sequence[tuple[NDArray[Any], float]]
"""Answers, and their share of the mean; shares add up to 1."""


@dataclass(frozen=True)
class Score:
    """How good a mean is."""

    value: float
    """Of the metric."""
    threshold: float
    """With which two classes were told apart."""


class HeldOut:
    """The rows of val, and what networks said of them."""

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        pixels: Pixels,
        folder: Path,
        device: torch.device,
        *,
        batch: int = 64,
        metric: str | None = None,
        is_tuned: bool = False,
    ) -> None:
        """Look at a dataset.

        Args:
            dataset: with a validation split.
            task: classify or segment.
            pixels: as which candidates see rows.
            folder: for what is kept.
            device: of the networks.
            batch: rows at a time.
            metric: such as iou; None takes the task's headline.
            is_tuned: whether a mean of two classes gets a threshold of its own, else 0.5.
        Raises: ConfigError: a metric that does not follow from the confusion matrix.
        """
        self.dataset, self.task, self.pixels, self.device, self.batch = dataset, task, pixels, device, batch
        self.classes = len(pixels.classes)
        self.is_tuned = is_tuned and self.classes == 2
        self.metric = (metric or task.headline).removeprefix(f"{SPLIT}/")
        known = list(self._summary(np.zeros((self.classes, self.classes), np.int64)))
        if self.metric not in known:
            raise ConfigError(
                f"--metric {metric}{nearest(self.metric, known)}: expected one of {', '.join(known)}, which follow "
                "from what is confused with what"
            )
        self.sign = -1.0 if is_cost(self.metric) else 1.0
        width, height = dataset.manifest.sizes_px[2:]
        self.sides = (pixels.size_px, pixels.size_px) if pixels.size_px else (height, width)
        self.is_mask = task.target == "mask"
        self.found_rows = dataset.manifest.splits[SPLIT]
        self._folder, self._ids, self._number = folder, list[str](), 0
        self._channels = 1 if self.classes == 2 else self.classes
        self._row_values = self._channels * (math.prod(self.sides) if self.is_mask else 1)
        self._dtype = np.float16 if self.is_mask and self.classes > 2 else np.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of one image."""
        return (self.pixels.channels, *self.sides)

    def answers(self, network: torch.nn.Module) -> NDArray[Any]:
        """Probabilities of all rows that are kept, on disk: of the second class [N, ...], of more classes [N, K, ...].

        Args:
            network: gives logits of images as `pixels` says, on the device.
        """
        self._number += 1
        file, rows = self._folder / f"{self._number}.bin", list[str]()
        truths, scenes = list[NDArray[Any]](), list[str]()
        with file.open("wb") as out, torch.no_grad():
            for ids, of, batch in self._kept():
                p = self.task.predict(network(batch["image"]).float())[1]
                p = p[:, 1] if self.classes == 2 else p
                out.write(p.cpu().numpy().astype(self._dtype).tobytes())
                rows += ids
                if not self._ids:
                    scenes += of
                    truths.append(batch[self.task.target].cpu().numpy().astype(np.int32))
        if not self._ids:
            self._begin(rows, scenes, np.concatenate(truths) if truths else np.zeros(0))
        if rows != self._ids:
            raise RuntimeError("a second pass over the validation split gave other rows than the first")
        return np.memmap(file, self._dtype, "r", shape=(len(rows), *self._answer_shape))

    def score(self, mean: Mean) -> Score:
        """The metric on the rows that choose, with the threshold that is best there."""
        if not self.is_tuned:
            matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
            for p, truth in self._chunks(mean, self.choosing):
                matrix += confusion(self._said(p, 0.5), truth, self.classes)
            return Score(self.of(matrix.numpy()), 0.5)
        counted = np.zeros(3 * LEVELS, np.int64)
        for p, truth in self._chunks(mean, self.choosing):
            level = torch.clamp((p * LEVELS).long(), max=LEVELS - 1)
            row = torch.where(truth == IGNORE, 2, truth)
            counted += np.bincount((row * LEVELS + level).flatten().numpy(), minlength=3 * LEVELS)
        counts = torch.zeros(2, binned.BINS, dtype=torch.int64)
        counts.index_add_(1, _bin_of_level(), torch.from_numpy(counted.reshape(3, LEVELS)[:2]))
        return self._best(counts)

    def exact_score(self, mean: Mean) -> Score:
        """The same, with the bins that thresholds come from."""
        if not self.is_tuned:
            return self.score(mean)
        counts = torch.zeros(2, binned.BINS, dtype=torch.int64)
        for p, truth in self._chunks(mean, self.choosing):
            counts += binned.counts(p, truth, torch.ones(len(p), dtype=torch.bool))
        return self._best(counts)

    def confusions(self, mean: Mean, rows: NDArray[np.int64], threshold: float) -> Any:
        """The confusion matrix of each row, int64 [n, K*K], sparse."""
        cells, at = list[NDArray[Any]](), list[NDArray[Any]]()
        first = 0
        for p, truth in self._chunks(mean, rows):
            cell = (truth * self.classes + self._said(p, threshold)).flatten(1 if self.is_mask else 0)
            row = torch.arange(first, first + len(p)).view(-1, *[1] * (cell.ndim - 1)).expand_as(cell)
            is_known = (truth != IGNORE).view_as(cell)
            places, times = np.unique((row * self.classes**2 + cell)[is_known].numpy(), return_counts=True)
            cells.append(places)
            at.append(times)
            first += len(p)
        row_of, cell_of = np.divmod(np.concatenate(cells), self.classes**2)
        return csr_array((np.concatenate(at), (row_of, cell_of)), shape=(len(rows), self.classes**2))

    def of(self, flat: NDArray[Any]) -> float:
        """The metric of a flat confusion matrix."""
        return self._summary(np.asarray(flat).reshape(self.classes, self.classes))[self.metric]

    def _said(self, p: torch.Tensor, threshold: float) -> torch.Tensor:
        """Classes int64 of mean probabilities."""
        return (p >= threshold).long() if self.classes == 2 else p.argmax(1)

    def _summary(self, matrix: NDArray[Any]) -> dict[str, float]:
        return self.task.summarise({"confusion": torch.from_numpy(matrix.astype(np.int64))}, self.pixels.classes)

    def _best(self, counts: torch.Tensor) -> Score:
        threshold = binned.best_threshold(counts, self.task.headline)
        return Score(self.of(binned.confusion_at(counts, threshold).numpy()), threshold)

    def by_unit(self, confusions: Any) -> Any:
        """Confusions of the rows that check, added up over those that belong together, [units, K*K]."""
        units, place = np.unique(self._units[self.checking], return_inverse=True)
        ones = np.ones(len(place), np.int64)
        return csr_array((ones, (place, np.arange(len(place)))), shape=(len(units), len(place))) @ confusions

    def _kept(self) -> Iterator[tuple[list[str], list[str], dict[str, Any]]]:
        """Ids, what each row is a part of (a scene, or itself), and the batch."""
        share = MOST_VALUES / (self._row_values * self.found_rows)
        feed = Feed(self.dataset, SPLIT, self.pixels, self.batch, threads=torch.get_num_threads())
        for _, raw in feed.epoch(0):
            taken = [bool(ok) and _hash("kept", row) < share for ok, row in zip(raw["valid"], raw["id"], strict=True)]
            if any(taken):
                batch = to_device(raw, self.pixels, self.device, False)
                mask = torch.tensor(taken, device=self.device)
                kept = {key: batch[key][mask] for key in ("image", self.task.target)}
                rows = [
                    (row, scene_of(path) or row)
                    for row, path, one in zip(raw["id"], raw["path"], taken, strict=True)
                    if one
                ]
                yield [row for row, _ in rows], [scene for _, scene in rows], kept

    def _begin(self, ids: list[str], scenes: list[str], truth: NDArray[Any]) -> None:
        units = {unit: _hash("check", unit) < 0.5 for unit in scenes}
        if min(sum(units.values()), len(units) - sum(units.values())) < LEAST_UNITS:
            scenes = ids
            units = {row: _hash("check", row) < 0.5 for row in ids}
        is_checking = np.array([units[unit] for unit in scenes], bool)
        self._ids, self._truth, self._units = ids, truth, np.array(scenes, dtype=object)
        self.choosing, self.checking = np.flatnonzero(~is_checking), np.flatnonzero(is_checking)
        if min(len(self.choosing), len(self.checking)) < FEWEST_ROWS:
            raise DataError(
                f"the val split of {self.dataset.uri} has {len(ids)} rows, {len(self.choosing)} to choose by and "
                f"{len(self.checking)} to check with: at least {FEWEST_ROWS} of each are needed, and hundreds to see "
                "a small gain; ingest with a larger share, as --split 70/20/10"
            )

    @property
    def _answer_shape(self) -> tuple[int, ...]:
        of_row = self.sides if self.is_mask else ()
        return of_row if self.classes == 2 else (self.classes, *of_row)

    def _chunks(self, mean: Mean, rows: NDArray[np.int64]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Mean probabilities float32 and truth int64 of some rows at a time."""
        step = max(1, AT_ONCE // self._row_values)
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            p = sum(np.float32(share) * answers[some].astype(np.float32, copy=False) for answers, share in mean)
            yield torch.from_numpy(p), torch.from_numpy(self._truth[some].astype(np.int64))


def common_pixels(seen: Sequence[PixelFacts], sides: tuple[int, int, int, int]) -> PixelFacts:
    """Pixels of which those of every candidate can be made: all bands, and the size of all or none.

    Args:
        seen: pixels of the candidates, of one colour, dtype and mask values.
        sides: smallest width and height, largest width and height of the images.
    Raises: DataError: resized in several ways that no images serve.
    """
    first = seen[0]
    told: dict[str, Any] = {}
    if len({one.bands for one in seen}) > 1:
        whole = next((one for one in seen if one.bands is None), None)
        known = {
            band: (one.mean[at], one.std[at], one.span[at] if one.span else None)
            for one in reversed(seen)
            for at, band in enumerate(one.bands or range(1, one.channels + 1))
        }
        bands = sorted(known)
        mean, std, span = zip(*(known[band] for band in bands), strict=True)
        told = {"bands": None if whole else tuple(bands), "channels": len(bands), "mean": mean, "std": std}
        told["span"] = () if None in span else span
    sizes = {(one.size_px, one.resize if one.size_px else "") for one in seen}
    is_whole = sides[0] == sides[1] or all(how != "crop" for _, how in sizes)
    if len(sizes) > 1 and sides[:2] == sides[2:] and is_whole:
        told["size_px"] = None
    elif len(sizes) > 1:
        if len({how for _, how in sizes}) > 1:
            raise DataError(
                "some candidates see their images stretched, some cropped or as they are, and no size of images serves "
                "all: name runs of one data.resize"
            )
        told["size_px"] = max(one.size_px or 0 for one in seen)
    return first.model_copy(update=told)


def _hash(what: str, row: str) -> float:
    """A number from 0 to 1."""
    return int.from_bytes(hashlib.sha256(f"ensemble {what} {row}".encode()).digest()[:8]) / 2**64


@lru_cache(maxsize=1)
def _bin_of_level() -> torch.Tensor:
    return binned.bins(torch.arange(LEVELS, dtype=torch.float64).div(LEVELS).float())
