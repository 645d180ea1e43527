"""What a threshold does to two classes, as PNG bytes: precision and recall, scores by threshold, calibration."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from scalecv.metrics import binned
from scalecv.tasks.charts import BLUE, GREEN, GRID, INK, ORANGE, RED, figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE_IN = 3.6


def curves_of_two(counts: Tensor, threshold: float, title: str) -> dict[str, bytes]:
    """All three pictures by their names; `counts` are int64 [2, BINS] (see metrics.binned), truth in rows."""
    return {
        "precision_recall": precision_recall_png(counts, threshold, title),
        "thresholds": thresholds_png(counts, threshold, title),
        "calibration": calibration_png(counts, title),
    }


def precision_recall_png(counts: Tensor, threshold: float, title: str) -> bytes:
    """Precision against recall over all thresholds, the one in use marked."""
    found = binned.curve(counts)
    seen = (found.precision > 0) | (found.recall > 0)
    axes = _page(f"{title}: average precision {binned.average_precision(counts):.4f}", "recall", "precision")
    axes.plot(found.recall[seen], found.precision[seen], color=BLUE, linewidth=1.6)
    share = float(counts[1].sum()) / max(1, int(counts.sum()))
    axes.axhline(share, color="#999999", linewidth=0.8, linestyle="--", label=f"chance {share:.3f}")
    at = binned.place(threshold)
    label = f"threshold {threshold:.3f}: {float(found.precision[at]):.3f}, {float(found.recall[at]):.3f}"
    axes.plot(found.recall[at], found.precision[at], "o", color=RED, markersize=7, label=label, clip_on=False)
    return _done(axes)


def thresholds_png(counts: Tensor, threshold: float, title: str) -> bytes:
    """F1, IoU, precision and recall against the threshold, the one in use marked."""
    found = binned.curve(counts)
    axes = _page(f"{title}: scores by threshold", "threshold", "")
    lines = (("F1", found.f1, BLUE), ("IoU", found.iou, GREEN), ("precision", found.precision, ORANGE))
    for name, values, colour in (*lines, ("recall", found.recall, "#999999")):
        at = float(values[binned.place(threshold)])
        axes.plot(found.threshold[1::8], values[1::8], color=colour, linewidth=1.4, label=f"{name} {at:.3f}")
    axes.axvline(threshold, color=RED, linewidth=1, label=f"threshold {threshold:.3f}")
    return _done(axes)


def calibration_png(counts: Tensor, title: str) -> bytes:
    """Share of positives against the probability that was said, and how often each was said (logarithmic)."""
    said, true, total = (values.numpy() for values in binned.calibration(counts))
    axes = _page(f"{title}: calibration error {binned.calibration_error(counts):.4f}", "probability", "share positive")
    edges = (np.arange(binned.GROUPS) + 0.5) / binned.GROUPS
    heights = np.log10(total + 1) / max(1.0, float(np.log10(total.max() + 1)))
    label = f"count, logarithmic, up to {int(total.max()):,}"
    axes.bar(edges, heights, 0.9 / binned.GROUPS, color="#e4e9f0", label=label)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle="--", label="as it should be")
    seen = total > 0
    axes.plot(said[seen], true[seen], "o-", color=BLUE, markersize=4, linewidth=1.4, label="as it is")
    return _done(axes)


def _page(title: str, x: str, y: str) -> "Axes":
    axes = figure(SIDE_IN + 0.6, SIDE_IN).subplots()
    axes.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    return axes


def _done(axes: "Axes") -> bytes:
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
    return png(axes.figure)  # type: ignore[arg-type]  # never a part of a page here
