"""A sweep as one HTML file that needs nothing else: verdict, pictures, all trials."""

import base64
from collections.abc import Mapping
from html import escape

from scalecv.search.report import Swept, entrant_name
from scalecv.search.space import told

TITLES = {
    "race": "The race",
    "rungs": "What trials reached for their time",
    "parallel_coordinates": "Values of the trials",
    "importance": "Keys that count",
    "cost_and_quality": "Cost and quality",
}
BEST = ' class="best"'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.verdict { border-left: 4px solid #d9822b; padding: .4rem 1rem; background: #faf6f0 }
img { max-width: 100% } table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap } tr.best td { font-weight: 600 }
"""


def page(swept: Swept, pictures: Mapping[str, bytes], experiment: str) -> str:
    """The report of a sweep.

    Args:
        swept: how it ended.
        pictures: PNG by name, as `pictures.draw_all` gives them.
        experiment: YAML of the experiment with its space.
    """
    images = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'
        for name, title in TITLES.items()
        if name in pictures
    )
    best = f"<p>To use: {escape(swept.to_use)}<br><code>{escape(swept.best.bundle)}</code></p>" if swept.best else ""
    spent = (
        f"{len(swept.trials)} trials and {len(swept.race)} trainings of the race, {swept.device_s:,.0f} device-seconds"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(swept.name)}</title>'
        f"<style>{STYLE}</style><h1>{escape(swept.name)}</h1><p>{spent}</p>"
        f'<p class="verdict">{escape(swept.verdict.sentence)}</p>{best}{_race(swept)}{images}'
        f"<h2>All trials</h2>{_table(swept)}<h2>Experiment</h2><pre>{escape(experiment)}</pre></html>\n"
    )


def _race(swept: Swept) -> str:
    means = swept.verdict.means or {}
    if not means:
        return ""
    shown = [(entrant_name(one), means[one], _values(swept, one)) for one in swept.verdict.order if one in means]
    cells = "".join(
        f'<tr><td>{name}</td><td class="n">{mean:.4f}</td><td>{escape(values)}</td></tr>'
        for name, mean, values in shown
    )
    head = f"<th>entrant</th><th>mean {escape(swept.metric)}</th><th>values</th>"
    return f"<h2>Means over {swept.verdict.seeds} new seeds</h2><table><tr>{head}</tr>{cells}</table>"


def _values(swept: Swept, entrant: int) -> str:
    return told(swept.trials[entrant].overrides) if entrant >= 0 else ""


def _table(swept: Swept) -> str:
    head = "".join(
        f"<th>{escape(name)}</th>" for name in ("trial", "status", "epochs", swept.metric, "device-s", "values", "why")
    )
    rows = []
    for one in swept.trials:
        value = f"{one.points[-1].value:.4f}" if one.points else ""
        numbers = (str(one.number), one.status, str(one.epochs), value, f"{one.device_s:,.0f}")
        cells = "".join(f'<td class="n">{escape(text)}</td>' for text in numbers)
        cells += f"<td>{escape(told(one.overrides))}</td><td>{escape(one.cause)}</td>"
        is_best = swept.best is not None and one.number == swept.best.number
        rows.append(f"<tr{BEST if is_best else ''}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
