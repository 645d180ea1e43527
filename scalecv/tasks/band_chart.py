"""What a metric loses without each band, as a chart."""

import math
from collections.abc import Sequence

from scalecv.tasks.charts import BLUE, GRID, INK, ORANGE, figure, png


def bands_png(rows: Sequence[tuple[str, float, float, float]], metric: str, value: float) -> bytes:
    """A bar for each band, in the order given.

    Args:
        rows: name, loss with the pixels of another row, its standard error (NaN: unknown), loss at the band's mean.
        metric: its name.
        value: of all bands.
    """
    page = figure(6.5, 0.36 * len(rows) + 1.4)
    axes = page.subplots()
    places = list(range(len(rows)))
    errors = [0.0 if math.isnan(error) else error for _, _, error, _ in rows]
    axes.barh(places, [row[1] for row in rows], xerr=errors, color=BLUE, height=0.6, label="pixels of another row")
    axes.plot([row[3] for row in rows], places, "D", color=ORANGE, markersize=5, label="band at its mean")
    axes.set_yticks(places, [row[0] for row in rows], fontsize=9, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"lost of {metric}, {value:.4f} with all bands", fontsize=9)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return png(page)
