"""Tables and charts of a run as PNG or CSV bytes: confusion, single classes, curves. Drawn without a display."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from scalecv.metrics.confusion import accuracy, per_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, BLUE, ORANGE, GREEN, RED = "#222222", "#dddddd", "#2f6fb0", "#d9822b", "#3a8f4d", "#c0392b"
COUNTS_UP_TO = 20
"""Classes up to which the cells of a confusion matrix carry their counts."""
NAMES_UP_TO = 100
"""Classes up to which each is named in a chart."""


def figure(width_in: float, height_in: float) -> "Figure":
    """An empty page, in inches; no global state, so threads may draw at the same time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(width_in, height_in), facecolor="white")
    FigureCanvasAgg(page)
    return page


def png(page: "Figure", dpi: int = 110) -> bytes:
    """The page as PNG."""
    import logging
    import warnings

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    out = io.BytesIO()
    with warnings.catch_warnings():
        # Class names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        page.savefig(out, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.15)
    return out.getvalue()


def short(name: str, most: int = 26) -> str:
    """A name cut to `most` letters; start and end stay, where names of one kind differ."""
    head = most * 3 // 5
    return name if len(name) <= most else f"{name[:head]}…{name[len(name) - (most - head - 1) :]}"


def confusion_png(matrix: Any, classes: Sequence[str], iou: float | None = None) -> bytes:
    """The confusion matrix, shaded by the share of each true class; counts in the cells of up to 20 classes.

    Args:
        matrix: whole numbers [K, K], truth in rows.
        iou: stands in the title where it is given, else accuracy does.
    """
    from matplotlib.colors import PowerNorm

    m = np.asarray(matrix).astype(np.int64)
    k, true = len(classes), m.sum(1)
    share = m / np.maximum(true, 1)[:, None]
    side = max(3.6, 0.19 * min(k, NAMES_UP_TO) + 1.2, 0.55 * k if k <= COUNTS_UP_TO else 0)
    page = figure(side + 1.6, side)
    axes = page.subplots()
    # The root makes rare mistakes visible beside a full diagonal.
    shown = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if k <= NAMES_UP_TO:
        _name_axes(axes, classes, true)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth (rows)" if k > 1 else "truth")
    score = f"accuracy {accuracy(torch.from_numpy(m)):.4f}" if iou is None else f"IoU {iou:.4f}"
    axes.set_title(f"{score} of {m.sum():,}", fontsize=10, color=INK)
    axes.tick_params(which="both", length=0)
    if k <= COUNTS_UP_TO:
        for row, column in zip(*np.nonzero(m), strict=True):
            dark = share[row, column] > 0.35
            text = _brief(int(m[row, column]))
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    elif k <= NAMES_UP_TO:
        for row, column in zip(*np.nonzero(share * (1 - np.eye(k)) >= 0.02), strict=True):
            colour = "white" if share[row, column] > 0.25 else RED
            text = f"{100 * share[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=5, color=colour)
    bar = page.colorbar(shown, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_label("share of the true class" + ("" if k <= COUNTS_UP_TO else "; mistakes from 2 % in %"), fontsize=8)
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"], fontsize=8)
    bar.outline.set_visible(False)
    return png(page)


def _name_axes(axes: "Axes", classes: Sequence[str], true: NDArray[Any]) -> None:
    k = len(classes)
    size = 9 if k <= COUNTS_UP_TO else 7
    names = [short(name) for name in classes]
    rows = [f"{name}  ({count:,})" for name, count in zip(names, true, strict=True)]
    is_long = k > 4 and max(map(len, names)) > 3
    axes.set_yticks(range(k), rows, fontsize=size, parse_math=False)
    axes.set_xticks(range(k), names, fontsize=size, rotation=90 if is_long else 0, parse_math=False, va="top")
    for ticks in (axes.set_xticks, axes.set_yticks):
        ticks(np.arange(-0.5, k), minor=True)
    axes.grid(which="minor", color="#eeeeee", linewidth=0.5)


def per_class_csv(matrix: Any, classes: Sequence[str]) -> bytes:
    """One line per class: class, support, precision, recall, f1, iou, and what it is most often taken for."""
    m = torch.as_tensor(np.asarray(matrix)).long()
    each = per_class(m)
    wrong = m.clone().fill_diagonal_(0)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["class", "support", "precision", "recall", "f1", "iou", "most_taken_for", "times"])
    for place, name in enumerate(classes):
        numbers = [f"{float(each[key][place]):.6f}" for key in ("precision", "recall", "f1", "iou")]
        times, other = (int(v) for v in wrong[place].max(0))
        writer.writerow([name, int(each["support"][place]), *numbers, classes[other] if times else "", times])
    return out.getvalue().encode()


def per_class_png(matrix: Any, classes: Sequence[str]) -> bytes:
    """Precision, recall and F1 of each class (of the hundred hardest), hardest first, with the number of rows."""
    m = torch.as_tensor(np.asarray(matrix)).long()
    each = {name: value.numpy() for name, value in per_class(m).items()}
    order = np.argsort(each["f1"], kind="stable")[:NAMES_UP_TO]
    k = len(order)
    page = figure(7, max(2.2, 0.2 * k + 0.9))
    axes = page.subplots()
    places = np.arange(k)
    axes.barh(places, each["f1"][order], color="#cfdff0", height=0.72, label="F1")
    axes.plot(each["precision"][order], places, "o", color=ORANGE, markersize=4, label="precision")
    axes.plot(each["recall"][order], places, "o", color=BLUE, markersize=4, label="recall")
    labels = [f"{short(classes[i])}  ({int(each['support'][i]):,})" for i in order]
    axes.set_yticks(places, labels, fontsize=9 if k <= COUNTS_UP_TO else 7, parse_math=False)
    axes.set_ylim(k - 0.5, -0.5)
    axes.set_xlim(0, 1.02)
    plain(axes, "x")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)
    return png(page)


def curves_png(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and metrics over the epochs, the best epoch of each metric marked.

    Args:
        history: one record per epoch: epoch, train/loss, val/loss, val/accuracy, val/iou ….
    """
    page = figure(9.5, 3.4)
    left, right = page.subplots(1, 2)
    for key, colour in (("train/loss", BLUE), ("val/loss", ORANGE)):
        _line(left, history, key, colour, best=np.argmin if key == "val/loss" else None)
    named = [("val/iou", GREEN), ("val/accuracy", BLUE), ("val/macro_accuracy", ORANGE), ("val/f1", RED)]
    if any("val/iou" in row for row in history):  # beside it, accuracy says how much is background
        named = [("val/iou", GREEN), ("val/f1", RED), ("val/average_precision", BLUE)]
    for key, colour in named:
        _line(right, history, key, colour, best=np.argmax)
    for axes, title in ((left, "loss"), (right, "validation")):
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("epoch", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes, "y")
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", transform=axes.transAxes, color="#888888")
    page.subplots_adjust(wspace=0.18)
    return png(page)


def _line(axes: "Axes", history: Sequence[Mapping[str, float]], key: str, colour: str, best: Any) -> None:
    points = [(row.get("epoch", place + 1), row[key]) for place, row in enumerate(history) if key in row]
    points = [(x, y) for x, y in points if np.isfinite(y)]
    if not points:
        return
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    label = key
    if best is not None:
        at = int(best(y))
        label = f"{key}  {y[at]:.4f} at {x[at]:.0f}"
        axes.plot(x[at], y[at], "o", color=colour, markersize=6, markerfacecolor="white", zorder=3)
    axes.plot(x, y, color=colour, linewidth=1.6, marker="." if len(x) < 40 else None, label=label)


def plain(axes: "Axes", grid: Literal["x", "y"]) -> None:
    """A chart without a frame, with thin lines across the values."""
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _brief(count: int) -> str:
    """A count in at most five letters: 12345, 1.2M."""
    for factor, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= factor:
            scale = 1000 if letter == "k" else factor
            return f"{count / scale:.3g}{letter}"
    return str(count)
