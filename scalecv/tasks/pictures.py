"""What a model saw, what was true and what it said, as PNG bytes. The charts stand in `charts`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalecv.schema import IGNORE
from scalecv.tasks.charts import (
    GREEN,
    INK,
    RED,
    confusion_png,
    curves_png,
    figure,
    per_class_csv,
    per_class_png,
    png,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Sample",
    "confusion_png",
    "curves_png",
    "images_png",
    "per_class_csv",
    "per_class_png",
    "predictions_png",
    "to_rgb",
]

Pixels = NDArray[np.uint8]
TILE, GAP, CAPTION = 144, 6, 36
"""Pixels of a picture's side, between pictures, and of the lines of text below."""
UNLABELLED = (150, 150, 150)


@dataclass(frozen=True)
class Sample:
    """One row as the model saw it. H x W pixels, K classes."""

    image: Pixels
    """uint8 [H, W, 3]."""
    truth: NDArray[Any]
    """Class, int64 [] or [H, W]; IGNORE where not labelled."""
    prediction: NDArray[Any]
    """Class, int64 [] or [H, W]."""
    probability: NDArray[Any]
    """float32 [K], or [H, W]: of the foreground where there are two classes, else of the class predicted."""
    id: str
    """Row id."""
    path: str = ""
    """Of the image in the source."""

    def at(self, threshold: float) -> "Sample":
        """The same with two classes told apart at a threshold."""
        second = self.probability if self.truth.ndim else self.probability[1]
        return replace(self, prediction=np.asarray(second >= threshold).astype(np.int64))


def to_rgb(image: NDArray[Any], low: float = 2.0, high: float = 98.0) -> Pixels:
    """Any raster as a picture, uint8 [H, W, 3].

    Args:
        image: [C, H, W] in the dtype of the file. One or two channels become grey, the first three red, green, blue.
            uint8 stays as it is; other values are stretched so that the percentiles `low` and `high` of each channel
            become black and white. What is not finite is black.
    """
    channels = image[[0, 0, 0]] if image.shape[0] < 3 else image[:3]
    if channels.dtype == np.uint8:
        return np.ascontiguousarray(channels.transpose(1, 2, 0))
    values = channels.astype(np.float32)
    out = np.zeros(values.shape, np.float32)
    for place, channel in enumerate(values):
        finite = np.isfinite(channel)
        if finite.any():
            black, white = np.percentile(channel[finite], [low, high])
            stretched = (channel[finite] - black) / max(float(white - black), 1e-12)
            out[place][finite] = stretched.clip(0, 1) if white > black else 0.5
    return np.ascontiguousarray((out * 255).round().astype(np.uint8).transpose(1, 2, 0))


def predictions_png(samples: Sequence[Sample], classes: Sequence[str], task: str, title: str) -> bytes:
    """Samples with truth and prediction.

    Args:
        samples: of one task, any sizes.
        task: classify draws a grid of images, a wrong answer in red; segment draws image, truth, prediction and
            errors of each sample in a row.
    """
    if task == "segment":
        return _segmentations(samples, classes, title)
    return _classifications(samples, classes, title)


def images_png(rows: Sequence[Sequence[Pixels]], heads: Sequence[str], notes: Sequence[str], title: str) -> bytes:
    """Rows of pictures side by side.

    Args:
        rows: uint8 [H, W, 3] each, as many in each row as there are heads.
        heads: what each picture of a row is.
        notes: a line of text for each row.
        title: above all.
    """
    sheet, places = _sheet(rows, 2 if len(rows) > 3 else 1)
    axes = _page(sheet, title)
    for note, (x, y) in zip(notes, places, strict=True):
        for place, head in enumerate(heads):
            _caption(axes, x + place * (TILE + GAP), y + TILE + 3, head, INK)
        _caption(axes, x, y + TILE + 19, note, "#666666")
    return png(axes.figure)  # type: ignore[arg-type]  # never a part of a page here


def _classifications(samples: Sequence[Sample], classes: Sequence[str], title: str) -> bytes:
    across = min(8, max(4, int(np.ceil(len(samples) ** 0.5))))
    sheet, places = _sheet([[sample.image] for sample in samples], across)
    axes = _page(sheet, title)
    for sample, (x, y) in zip(samples, places, strict=True):
        truth, said = int(sample.truth), int(sample.prediction)
        sure = float(np.asarray(sample.probability)[said])
        right = truth == said
        first = "not labelled" if truth == IGNORE else short(classes[truth], 20)
        _caption(axes, x, y + TILE + 3, first, INK)
        _caption(axes, x, y + TILE + 19, f"{short(classes[said], 15)} {sure:.2f}", GREEN if right else RED)
    return png(axes.figure)  # type: ignore[arg-type]  # never a part of a page here


def _segmentations(samples: Sequence[Sample], classes: Sequence[str], title: str) -> bytes:
    colours = palette(len(classes))
    rows = []
    for sample in samples:
        shown = (_coloured(sample.truth, colours), _coloured(sample.prediction, colours), _errors(sample, len(classes)))
        rows.append([sample.image, *shown])
    sheet, places = _sheet(rows, 2 if len(samples) > 3 else 1)
    axes = _page(sheet, title)
    heads = ("image", "truth", "prediction", "errors")
    for sample, (x, y) in zip(samples, places, strict=True):
        for place, head in enumerate(heads):
            _caption(axes, x + place * (TILE + GAP), y + TILE + 3, head, INK)
        _caption(axes, x, y + TILE + 19, f"{short(sample.id, 16)}   {_agreement(sample, len(classes))}", "#666666")
    _legend(axes, classes, colours)
    return png(axes.figure)  # type: ignore[arg-type]  # never a part of a page here


def palette(count: int) -> Pixels:
    """Colours of classes, uint8 [K, 3]: nearly black for class 0, then well apart from each other."""
    from matplotlib.colors import hsv_to_rgb

    place = np.arange(max(1, count))
    # Steps of the golden angle never come back to the same hue.
    hsv = np.stack([(0.52 + 0.618034 * place) % 1, 0.55 + 0.35 * (place % 2), 0.95 - 0.2 * (place % 3 == 2)], 1)
    out: Pixels = (hsv_to_rgb(hsv) * 255).astype(np.uint8)
    out[0] = (38, 38, 46)
    return out


def _coloured(mask: NDArray[Any], colours: Pixels) -> Pixels:
    out: Pixels = colours[np.clip(mask, 0, len(colours) - 1)]
    out[mask == IGNORE] = UNLABELLED
    return out


def _errors(sample: Sample, classes: int) -> Pixels:
    """The image in pale grey; hits green, misses blue, false positives red; more classes: errors red."""
    grey = sample.image.mean(2, keepdims=True) * 0.5 + 110
    out = np.repeat(grey, 3, 2)
    labelled = sample.truth != IGNORE
    wrong = labelled & (sample.truth != sample.prediction)
    marks = [(wrong, (214, 39, 40))]
    if classes == 2:
        marks = [
            (labelled & (sample.truth == 1) & ~wrong, (64, 160, 80)),
            (wrong & (sample.truth == 1), (31, 90, 200)),
            (wrong & (sample.truth == 0), (214, 39, 40)),
        ]
    for where, colour in marks:
        out[where] = 0.25 * out[where] + 0.75 * np.array(colour)
    return out.clip(0, 255).astype(np.uint8)


def _agreement(sample: Sample, classes: int) -> str:
    labelled = sample.truth != IGNORE
    truth, said = sample.truth[labelled], sample.prediction[labelled]
    if not truth.size:
        return "nothing labelled"
    if classes != 2:
        each = [(truth == k, said == k) for k in range(classes) if bool((truth == k).any() or (said == k).any())]
        return f"mean IoU {float(np.mean([(a & b).sum() / (a | b).sum() for a, b in each])):.2f}"
    union = int(((truth == 1) | (said == 1)).sum())
    return f"IoU {int(((truth == 1) & (said == 1)).sum()) / union:.2f}" if union else "no foreground, none found"


def _sheet(rows: Sequence[Sequence[Pixels]], across: int) -> tuple[Pixels, list[tuple[int, int]]]:
    """All pictures on one canvas, `across` samples in a line, and the corner (x, y) of each sample.

    One canvas and one imshow: an axis for each picture would take seconds.
    """
    from PIL import Image

    each = len(rows[0]) if rows else 1
    width = each * (TILE + GAP) + (2 * GAP if each > 1 else GAP)
    height = TILE + CAPTION + GAP
    lines = -(-len(rows) // across) or 1
    sheet = np.full((lines * height, min(across, len(rows) or 1) * width, 3), 255, np.uint8)
    places = []
    for at, pictures in enumerate(rows):
        x, y = at % across * width, at // across * height
        places.append((x, y))
        for place, picture in enumerate(pictures):
            scale = TILE / max(picture.shape[:2])
            size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
            is_photo = place == 0 and scale < 1
            small = Image.fromarray(picture).resize(
                size, Image.Resampling.BOX if is_photo else Image.Resampling.NEAREST
            )
            left, top = x + place * (TILE + GAP) + (TILE - size[0]) // 2, y + (TILE - size[1]) // 2
            sheet[top : top + size[1], left : left + size[0]] = np.asarray(small)
    return sheet, places


def _page(sheet: Pixels, title: str) -> "Axes":
    page = figure(sheet.shape[1] / 110, sheet.shape[0] / 110)
    axes = page.add_axes((0, 0, 1, 1))
    axes.imshow(sheet, interpolation="nearest", aspect="equal")
    axes.axis("off")
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    return axes


def _caption(axes: "Axes", x: float, y: float, text: str, colour: str) -> None:
    axes.text(x, y, text, fontsize=7.5, color=colour, ha="left", va="top", parse_math=False)


def _legend(axes: "Axes", classes: Sequence[str], colours: Pixels) -> None:
    from matplotlib.patches import Patch

    entries: list[tuple[str, Any]] = [
        (short(name, 18), tuple(c / 255)) for name, c in zip(classes, colours, strict=False)
    ]
    if len(classes) == 2:
        entries += [("true positive", "#40a050"), ("false negative", "#1f5ac8"), ("false positive", "#d62728")]
    else:
        entries += [("wrong", "#d62728")]
    entries += [("not labelled", tuple(c / 255 for c in UNLABELLED))]
    handles = [Patch(facecolor=colour, label=label) for label, colour in entries[:50]]
    columns = max(2, axes.figure.bbox.width // 150)
    legend = axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        ncols=min(int(columns), len(handles)),
        fontsize=7.5,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
