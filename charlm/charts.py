"""The figures of a report, as Vega-Lite charts.

Colours are those of Okabe and Ito ("Color universal design", 2008), which nearly all eyes tell apart, and a cell has
its own mark as well. Each chart is as wide as where it stands; its title says the unit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from charlm.results import Result

CELLS = {"lstm": ("#0072B2", "circle"), "gru": ("#D55E00", "square"), "rnn": ("#009E73", "triangle-up")}
OTHER_CELL = ("#CC79A7", "diamond")

CONFIG = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif",
    "view": {"stroke": None},
    "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "color": "#1b2733", "offset": 12},
    "axis": {
        **{"labelColor": "#45525f", "titleColor": "#45525f", "titleFontWeight": "normal", "labelFontSize": 12},
        **{"titleFontSize": 12, "gridColor": "#e6eaee", "domainColor": "#9aa7b3", "tickColor": "#9aa7b3"},
    },
    "legend": {
        **{"orient": "bottom", "titleFontWeight": "normal", "labelFontSize": 12, "titleFontSize": 12},
        **{"labelColor": "#45525f", "titleColor": "#45525f", "columns": 4, "symbolSize": 90, "symbolOpacity": 1},
    },
}

MEASURES = {
    "real_words": ("Real words, % of words", "%"),
    "distinct_4grams": ("Distinct 4-grams, % of 4-grams", "%"),
    "loop_rate": ("In loops, % of characters", "%"),
    "copied": ("Copied, % of characters", "%"),
    "longest_copy": ("Longest copy, characters", ",d"),
    "entropy": ("Entropy of the next character, bits", ".1f"),
}

SPLITS = ["validation", "training"]

_POINTS = 300  # of a curve; more are thinned out
_WIDTH, _HEIGHT = 320, 240  # of a picture; on the page a chart is as wide as its column

Figures = dict[str, list[alt.TopLevelMixin]]


def draw_figures(results: Sequence[Result]) -> Figures:
    """Return the report's figures by name, each as charts that stand side by side; what there is no data for is not."""
    figures: Figures = {
        "losses_by_size": [
            *_heat_map(results, "Validation loss, bits per character", lambda run: run.val_bpc),
            *_heat_map(results, "Test loss, bits per character", lambda run: run.test_bpc),
        ],
        "loss_curves": _curves(results),
        "cost": [
            *_against(results, "parameters", "parameters", "~s"),
            *_against(results, "seconds", "seconds that the run took", "~s"),
        ],
        "samples": _measures(results),
    }
    return {name: charts for name, charts in figures.items() if charts}


def picture(charts: Sequence[Any]) -> dict[str, Any]:
    """Return charts as one, for a file."""
    spec: dict[str, Any] = alt.concat(*charts, columns=3, spacing=36).resolve_scale(color="independent").to_dict()
    return {**spec, "background": "white", "padding": 16}


def _heat_map(results: Sequence[Result], title: str, figure: Any) -> list[Any]:
    """Cell and layers against hidden size; of several runs in one place the best."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in results:
        value, place = figure(run), (run.cell, run.num_layers, run.hidden_size)
        if value is None or run.hidden_size is None:
            continue
        if place not in best or value < best[place]["bpc"]:
            network = f"{run.cell}, {run.num_layers} layer{'s' * (run.num_layers > 1)}"
            best[place] = {"network": network, "size": run.hidden_size, "bpc": value, "run": run.name}
    if not best:
        return []
    values = [row["bpc"] for row in best.values()]
    networks = len({row["network"] for row in best.values()})
    bright = (min(values) + max(values)) / 2  # above, the colour is so bright that black is read better
    base = alt.Chart(
        alt.InlineData(values=list(best.values())), title=title, width=_WIDTH, height=44 * networks
    ).encode(
        x=alt.X("size:O", title="hidden units", axis=alt.Axis(labelAngle=0, orient="bottom")),
        y=alt.Y("network:N", title=None, sort=None),
        tooltip=[
            alt.Tooltip("run:N"),
            alt.Tooltip("network:N"),
            alt.Tooltip("size:Q", title="hidden units"),
            alt.Tooltip("bpc:Q", title="bits per character", format=".4f"),
        ],
    )
    tiles = base.mark_rect(cornerRadius=4, stroke="white", strokeWidth=2).encode(
        color=alt.Color("bpc:Q", scale=alt.Scale(scheme="viridis", zero=False), legend=None)
    )
    text = base.mark_text(fontSize=13).encode(
        text=alt.Text("bpc:Q", format=".3f"),
        color=alt.condition(alt.datum.bpc > bright, alt.value("#111"), alt.value("white"))
        if len(set(values)) > 1
        else alt.value("white"),
    )
    return [alt.layer(tiles, text)]


def _curves(results: Sequence[Result]) -> list[Any]:
    """Loss against steps, a chart for each cell, all of one height."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in results:
        for split, name in (("validation", "val/bpc"), ("training", "train/bpc")):
            points = [(row["step"], row[name]) for row in run.metrics if name in row and "step" in row]
            for step, bpc in _thinned(points):
                rows[run.cell].append({"run": run.name, "size": run.size, "split": split, "step": step, "bpc": bpc})
    shown = [row["bpc"] for cell in rows.values() for row in cell]
    if not shown:
        return []
    # The first steps of training would press all else to the ground.
    validated = [row["bpc"] for cell in rows.values() for row in cell if row["split"] == "validation"]
    domain = [min(shown), max(validated or shown)]
    return [_curves_of(cell, rows[cell], domain) for cell in rows]


def _curves_of(cell: str, rows: list[dict[str, Any]], domain: list[float]) -> Any:
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    picked = alt.selection_point(f"picked_{cell}", fields=["size"], bind="legend")
    return (
        alt.Chart(alt.InlineData(values=rows), title=f"{cell}: loss, bits per character", width=_WIDTH, height=_HEIGHT)
        .mark_line(clip=True, strokeWidth=2)
        .encode(
            x=alt.X("step:Q", title="optimizer steps", axis=alt.Axis(tickCount=5, format="~s")),
            y=alt.Y("bpc:Q", title=None, scale=alt.Scale(domain=domain, zero=False, nice=True)),
            color=alt.Color(
                "size:N",
                title="hidden units x layers",
                sort=sizes,
                scale=alt.Scale(domain=sizes, range=_shades(len(sizes))),
            ),
            strokeDash=alt.StrokeDash("split:N", legend=None, scale=alt.Scale(domain=SPLITS, range=[[1, 0], [4, 3]])),
            detail="run:N",
            opacity=alt.condition(picked, alt.value(1.0), alt.value(0.12)),
            tooltip=["run:N", "split:N", "step:Q", alt.Tooltip("bpc:Q", title="bits per character", format=".4f")],
        )
        .add_params(picked)
    )


def _shades(count: int) -> list[str]:
    """Return colours from bright to dark, of the viridis scale without its brightest."""
    scale = ["#7ad151", "#22a884", "#2a788e", "#414487", "#440154"]
    return [scale[round(i * (len(scale) - 1) / max(count - 1, 1))] for i in range(count)] if count > 1 else [scale[2]]


def _against(results: Sequence[Result], name: str, title: str, number_format: str) -> list[Any]:
    """Loss against what a run costs."""
    rows: list[dict[str, Any]] = []
    for run in results:
        tested, cost = run.test_bpc is not None, run.figure(name)
        bpc = run.test_bpc if tested else run.val_bpc
        if run.status != "completed" or cost is None or bpc is None:
            continue
        error = run.figure("test/bpc_standard_error") or 0.0 if tested else 0.0
        network = {"run": run.name, "cell": run.cell, "layers": run.num_layers, "hidden": run.hidden_size}
        losses = {"bpc": bpc, "low": bpc - error, "high": bpc + error, "tested": tested}
        rows.append({**network, "size": run.size, "cost": cost, **losses})
    if not rows:
        return []
    split = "test" if all(row["tested"] for row in rows) else "test, or else validation"
    costs = [row["cost"] for row in rows]
    log = min(costs) > 0 and max(costs) > 5 * min(costs)
    wide = [min(costs) / 1.3, max(costs) * 1.3]
    scale = alt.Scale(type="log", domain=wide, nice=False) if log else alt.Scale(zero=False, padding=16)
    base = alt.Chart(
        alt.InlineData(values=rows), title=f"Loss ({split}), bits per character", width=_WIDTH, height=_HEIGHT
    ).encode(
        x=alt.X(
            "cost:Q",
            title=f"{title}{' (logarithmic)' if log else ''}",
            scale=scale,
            axis=alt.Axis(format=number_format, tickCount=5),
        ),
        color=_cell_color(rows),
        tooltip=[
            "run:N",
            alt.Tooltip("size:N", title="hidden units x layers"),
            alt.Tooltip("cost:Q", title=title, format=",.6~r"),
            alt.Tooltip("bpc:Q", title="bits per character", format=".4f"),
        ],
    )
    y = alt.Y("bpc:Q", title=None, scale=alt.Scale(zero=False))
    return [
        alt.layer(
            base.mark_line(opacity=0.35).encode(y=y, detail="layers:N", order="hidden:Q"),
            base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", title=None), y2="high:Q"),
            base.mark_point(filled=True, size=90, opacity=1).encode(y=y, shape=_cell_shape(rows)),
        )
    ]


def _measures(results: Sequence[Result]) -> list[Any]:
    """Each measure of the samples against temperature."""
    rows = [
        {"run": run.name, "size": run.size, "cell": run.cell}
        | {name: sample.get(name) for name in ("temperature", *MEASURES)}
        for run in results
        for sample in run.samples
        if "entropy" in sample and math.isfinite(sample["temperature"])
    ]
    return [
        _measure(name, title, number_format, kept)
        for name, (title, number_format) in MEASURES.items()
        if (kept := [row for row in rows if row[name] is not None])
    ]


def _measure(name: str, title: str, number_format: str, rows: list[dict[str, Any]]) -> Any:
    columns = ("run", "size", "cell", "temperature", name)
    temperatures = sorted({row["temperature"] for row in rows})
    hovered = alt.selection_point(f"hovered_{name}", fields=["run"], on="pointerover", nearest=True, clear="pointerout")
    base = alt.Chart(
        alt.InlineData(values=[{column: row[column] for column in columns} for row in rows]),
        title=title,
        width=_WIDTH,
        height=_HEIGHT * 3 // 4,
    ).encode(
        x=alt.X(
            "temperature:Q",
            title="temperature (0 is greedy)",
            axis=alt.Axis(values=temperatures),
        ),
        y=alt.Y(f"{name}:Q", title=None, axis=alt.Axis(format=number_format, tickCount=5), scale=alt.Scale(zero=True)),
        color=_cell_color(rows),
        detail="run:N",
        opacity=alt.condition(hovered, alt.value(0.9), alt.value(0.12)),
        tooltip=[
            "run:N",
            alt.Tooltip("size:N", title="hidden units x layers"),
            "temperature:Q",
            alt.Tooltip(f"{name}:Q", title=title, format=".3~f" if number_format == "%" else number_format),
        ],
    )
    lines = base.mark_line(strokeWidth=1.8)
    return alt.layer(lines, base.mark_point(filled=True, size=45).encode(shape=_cell_shape(rows)).add_params(hovered))


def _cell_color(rows: Iterable[dict[str, Any]]) -> Any:
    cells = _cells(rows)
    colors = [CELLS.get(cell, OTHER_CELL)[0] for cell in cells]
    return alt.Color("cell:N", title=None, scale=alt.Scale(domain=cells, range=colors))


def _cell_shape(rows: Iterable[dict[str, Any]]) -> Any:
    cells = _cells(rows)
    marks = [CELLS.get(cell, OTHER_CELL)[1] for cell in cells]
    return alt.Shape("cell:N", title=None, scale=alt.Scale(domain=cells, range=marks))


def _cells(rows: Iterable[dict[str, Any]]) -> list[str]:
    return sorted({row["cell"] for row in rows})


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return every n-th point of a curve and its last."""
    step = math.ceil(len(points) / _POINTS)
    return [*points[:: max(step, 1)], *(points[-1:] if step > 1 else [])]
