"""Which rows of a training split are used, and which of them more often, from the facts of single rows."""

from collections.abc import Sequence

import numpy as np

from scalecv import storage
from scalecv.batches.plan import raw_bits
from scalecv.batches.strata import Strata, weights
from scalecv.config import Data, Sampling
from scalecv.errors import ConfigError, DataError
from scalecv.shards.manifest import Manifest
from scalecv.shards.row_facts import classes_of, foreground_of, unknown
from scalecv.shards.store import Dataset


def check(data: Data, manifest: Manifest, where: str) -> None:
    """See that the dataset knows what sampling asks for.

    Raises: ConfigError: a kind of sampling for other labels. DataError: a dataset of an older release.
    """
    sampling = data.sampling
    if sampling.positive is not None and manifest.kind != "mask":
        raise ConfigError(
            f"data.sampling.positive={sampling.positive:g} needs masks, {where} has rows with a {manifest.kind}: "
            "set data.sampling.balance for classes"
        )
    if sampling.balance is not None and manifest.kind != "label":
        raise ConfigError(
            f"data.sampling.balance={sampling.balance:g} needs rows with a label, {where} has rows with a "
            f"{manifest.kind}: set data.sampling.positive for masks"
        )
    if (sampling.is_on or data.limit) and not manifest.row_facts.path:
        raise DataError(unknown(storage.without_secrets(where)))


def kinds_of(dataset: Dataset, split: str, min_share: float) -> np.ndarray:
    """uint16 [rows of the split]: the class; of masks 1 where more than `min_share` is foreground; else 0."""
    if dataset.manifest.kind == "image":
        return np.zeros(dataset.manifest.splits[split], np.uint16)
    if dataset.manifest.kind == "mask":
        return (foreground_of(dataset, split) > min_share).astype(np.uint16)
    return classes_of(dataset, split).astype(np.uint16)


def strata_of(kinds: np.ndarray, sampling: Sampling, where: str) -> Strata | None:
    """How often rows of these kinds are drawn; None where all alike.

    Raises: DataError: no row, or each, has foreground.
    """
    if not sampling.is_on:
        return None
    counts = np.bincount(kinds, minlength=2)
    if sampling.positive is None:
        targets = np.where(counts > 0, np.maximum(counts, 1) ** (1.0 - (sampling.balance or 0.0)), 0.0)
    else:
        if not counts[1] or (not counts[0] and sampling.positive < 1):
            raise DataError(
                f"{where}: {counts[1]:,} of {len(kinds):,} training images have more than {sampling.min_share:g} of "
                "foreground, and data.sampling.positive needs some with and some without: set another "
                "data.sampling.min_share, or leave it out"
            )
        targets = np.array([1 - sampling.positive, sampling.positive])
    return Strata(kinds, weights(counts, targets, sampling.most))


def limited(kinds: np.ndarray, group_rows: Sequence[int], limit: int, key: str) -> np.ndarray:
    """int64 [limit], ascending: numbers of the rows to use, each kind with its share of them and at least one.

    Row groups are gone through in a random order that depends on the key, so that few of them have to be read; rows
    lie in random order in them.
    """
    counts = np.bincount(kinds)
    quotas = _quotas(counts, min(limit, len(kinds)))
    ends = np.cumsum(np.asarray(group_rows, np.int64))
    order = np.argsort(raw_bits(f"{key}|limit", len(ends)), kind="stable")
    walked = np.concatenate([np.arange(ends[g] - group_rows[g], ends[g]) for g in order.tolist()])
    seen = kinds[walked]
    return np.sort(np.concatenate([walked[np.flatnonzero(seen == k)[:quota]] for k, quota in enumerate(quotas)]))


def _quotas(counts: np.ndarray, limit: int) -> np.ndarray:
    """Rows of each kind: shares by largest remainder, one at least where there is room for one of each."""
    quotas = np.minimum(counts, 1) if limit >= np.count_nonzero(counts) else np.zeros_like(counts)
    left = limit - quotas.sum()
    exact = (counts - quotas) * left / max(1, (counts - quotas).sum())
    whole = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - whole), kind="stable")[: left - whole.sum()]
    whole[rest] += 1
    return np.asarray(quotas + whole)
