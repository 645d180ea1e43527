"""Metrics of single classes under names that MLflow accepts."""

import re
from collections.abc import Sequence

from torch import Tensor

MOST = 20
"""Classes beyond which single ones are told in tables and pictures only."""


def each_class(metric: str, values: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """`metric_NAME` for each class; nothing if there are more than MOST."""
    if len(classes) > MOST:
        return {}
    names = metric_names(classes)
    return {f"{metric}_{name}": float(value) for name, value in zip(names, values, strict=True)}


def metric_names(classes: Sequence[str]) -> list[str]:
    """Class names with letters, digits, '_', '-' and '.' alone; those that became equal carry their place."""
    plain = [re.sub(r"[^\w.-]", "_", name) for name in classes]
    return [name if plain.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(plain)]
