"""What each row of a split adds to the metrics, kept while the split is scored: a few dozen bytes for each row.

Of a large split a sample is kept, the same rows in every run: those whose id lies lowest. An id is a hash, so the
sample is as if drawn by lot.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalecv.metrics.sums import everywhere
from scalecv.tasks.task import Batch, Task

MOST_ROWS = 200_000
_ID_BITS = 64
_WINDOW = re.compile(r"#\d+,\d+,\d+,\d+$")


def scene_of(path: str) -> str | None:
    """The scene that a row is a window of, by the row's path; None for an image of its own."""
    found = _WINDOW.search(path)
    return path[: found.start()] if found else None


class RowSums:
    """Grows batch by batch; rows that are not valid are passed over."""

    def __init__(self, task: Task, rows: int, threshold: float) -> None:
        """Start with nothing.

        Args:
            task: whose `rows` tells what is kept.
            rows: of the whole split; of more than MOST_ROWS about so many are kept.
            threshold: probability from which on two classes are told as the second.
        """
        self.task = task
        self.threshold = threshold
        self._end = (MOST_ROWS << _ID_BITS) // max(MOST_ROWS, rows)
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._scenes: dict[str, int] = {}

    def add(self, raw: Mapping[str, Any], batch: Batch, logits: torch.Tensor) -> None:
        """Keep the rows of a batch.

        Args:
            raw: the batch as it came from the feed.
            batch: the same on the device.
            logits: of the network.
        """
        ids, valid = raw["id"], raw["valid"].tolist()
        kept = [at for at in range(len(ids)) if valid[at] and int(ids[at][:16], 16) < self._end]
        if not kept:
            return
        found = {
            name: values.cpu().numpy()[kept] for name, values in self.task.rows(logits, batch, self.threshold).items()
        }
        if "confusion" in found:
            found |= _sparse(found.pop("confusion"))
        scenes = [self._scene(raw["path"][at]) for at in kept]
        self._parts.append(
            {"id": np.array([ids[at] for at in kept], "S32"), "scene": np.array(scenes, np.int32), **_small(found)}
        )

    def gathered(self) -> dict[str, NDArray[Any]]:
        """All rows of all ranks, by id, on every rank; empty where no rank kept a row.

        "id" S32 [N], "scene" [N] (None: no tile), and what the task tells. Of masks "cells" [N] tells how many cells of
        its confusion a row has, "cell" (truth times K plus prediction) and "count" what they are, row behind row.
        """
        names = np.array([*self._scenes, None], dtype=object)
        mine = {name: np.concatenate([part[name] for part in self._parts]) for name in (self._parts or [{}])[0]}
        if mine:
            mine["scene"] = names[mine["scene"]]
        every = [one for one in everywhere(mine) if one]
        if not every:
            return {}
        return _ordered({name: np.concatenate([one[name] for one in every]) for name in every[0]})

    def _scene(self, path: str) -> int:
        """Number of the scene that a tile is a window of; -1 for an image of its own."""
        scene = scene_of(path)
        return -1 if scene is None else self._scenes.setdefault(scene, len(self._scenes))


def _sparse(confusion: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """[B, K, K] without its zeros."""
    flat = confusion.reshape(len(confusion), -1)
    row, cell = np.nonzero(flat)
    return {"cells": np.bincount(row, minlength=len(flat)), "cell": cell, "count": flat[row, cell]}


def _small(found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: values.astype(np.int32) if values.dtype == np.int64 else values for name, values in found.items()}


def _ordered(found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """By id, each row's cells in their order."""
    order = np.argsort(found["id"], kind="stable")
    if "cells" not in found:
        return {name: values[order] for name, values in found.items()}
    row = np.repeat(np.argsort(order), found["cells"])  # the new place of each cell's row
    cells = np.lexsort((found["cell"], row))
    return {name: values[cells if name in ("cell", "count") else order] for name, values in found.items()}
