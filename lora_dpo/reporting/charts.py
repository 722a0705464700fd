"""Figures for plotly.js, made with plotly: colours by name of the page's, data as text.

plotly.js reads a small HTML in names, titles and hover texts (bold, links, line ends) and its own
templates in hover texts. What comes from a run is escaped for that before it gets there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import escape

from lora_dpo.reporting.curves import UNITS, Curve, smoothed
from lora_dpo.showing import visible

COLOURS = 7  # of the page's style, --run-0 and so on
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
HEIGHT = 260  # pixels
# One scale for both sides, so that they can be compared across their two charts.
PAIRED = {
    f"{kind}/{side}": kind for kind in ("rewards", "logratios") for side in ("chosen", "rejected")
}
CLEAR = "rgba(0,0,0,0)"


def plain(text: str) -> str:
    """Return a text that plotly.js shows as it is."""
    # what its templates would fill in begins with %{
    return str(escape(visible(text))).replace("%", "&#37;")


def colour(index: int) -> str:
    """Return the colour of a run, by its place."""
    return f"var(--run-{index % COLOURS})"


def curve_figure(
    metric: str,
    curves: Sequence[Curve],
    *,
    shared: tuple[float, float] | None = None,
    limit: float | None = None,
) -> dict[str, Any]:
    """Return the figure of one metric.

    Args:
        metric: its name.
        curves: of all runs.
        shared: the range of a second chart on the same scale.
        limit: a value to mark, if the curves come near it.
    """
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    figure = go.Figure(layout=_layout("step", UNITS.get(metric, "")))
    for curve in curves:
        for trace in _traces(curve):
            figure.add_trace(go.Scatter(trace))
    steps = [step for curve in curves for step in curve.steps]
    if steps and max(steps) - min(steps) < 8:
        figure.update_xaxes(dtick=1)
    if metric == "learning_rate":
        figure.update_yaxes(exponentformat="e", rangemode="tozero")
    if metric in ("tokens_per_second", "pairs_per_second", "memory/peak_gib"):
        figure.update_yaxes(rangemode="tozero")
    if metric == "rewards/accuracies":
        figure.update_yaxes(autorangeoptions={"include": [0.5, 1.0]})
    if shared is not None:
        figure.update_yaxes(autorangeoptions={"include": list(shared)})
    values = [v for curve in curves for v in curve.values if v is not None]
    if limit is not None and values and min(values) < limit / 2:
        line = {"color": "var(--found)", "width": 1, "dash": "dash"}
        figure.add_hline(y=limit, line=line)
    found: dict[str, Any] = figure.to_plotly_json()
    return found


def histogram_figure(edges: Sequence[int], counts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the figure of a histogram of tokens, a colour a part."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={**_layout("tokens", "rows"), "barmode": "group", "bargap": 0.15})
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    labels = [f"{low} to {high - 1} tokens" for low, high in pairwise(edges)]
    for index, (part, bars) in enumerate(counts.items()):
        figure.add_trace(
            go.Bar(
                x=middles[: len(bars)],
                y=list(bars),
                name=plain(part),
                customdata=labels[: len(bars)],
                hovertemplate="%{customdata}: %{y} rows",
                marker={"color": f"var(--part-{index})"},
            )
        )
    figure.update_layout(hovermode="closest")
    every = -(-len(middles) // 8)  # a mark a bin crowds a phone
    figure.update_xaxes(range=[edges[0], edges[-1]], tickvals=list(edges[::every]))
    found: dict[str, Any] = figure.to_plotly_json()
    return found


def scales(curves: Mapping[str, Sequence[Curve]]) -> dict[str, tuple[float, float]]:
    """Return, for metrics that are compared across charts, the range of both together."""
    found: dict[str, tuple[float, float]] = {}
    for kind in set(PAIRED.values()):
        both = [name for name in curves if PAIRED.get(name) == kind]
        values = [v for name in both for c in curves[name] for v in c.values if v is not None]
        if values:
            found |= {name: (min(values), max(values)) for name in both}
    return found


def _traces(curve: Curve) -> list[dict[str, Any]]:
    name, tint = plain(curve.name), colour(curve.index)
    marker = {"symbol": SYMBOLS[curve.index % len(SYMBOLS)], "size": 7, "color": tint}
    trace = {
        "x": list(curve.steps),
        "y": list(curve.values),
        "name": name,
        "mode": "lines+markers" if curve.held_out or len(curve.values) < 3 else "lines",
        "line": {"color": tint, "width": 2, "dash": "dot" if curve.held_out else "solid"},
        "marker": marker,
        "hovertemplate": "%{y:.4g}",
    }
    soft = smoothed(curve)
    if soft is None:
        return [trace]
    trace |= {"y": list(soft.mean), "name": f"{name}, mean of {soft.window} lines"}
    return [*_band(curve, soft.low, soft.high, tint), trace]


def _band(
    curve: Curve, low: Sequence[float | None], high: Sequence[float | None], tint: str
) -> list[dict[str, Any]]:
    there = [i for i, value in enumerate(low) if value is not None]
    around = [*there, *reversed(there)]
    edge = [high[i] for i in there] + [low[i] for i in reversed(there)]
    return [
        {
            "x": [curve.steps[i] for i in around],
            "y": edge,
            "name": f"{plain(curve.name)}, from least to greatest",
            "fill": "toself",
            "fillcolor": tint,
            "opacity": 0.2,
            "mode": "lines",
            "line": {"width": 0, "color": tint},
            "hoverinfo": "skip",
        }
    ]


def _layout(across: str, up: str) -> dict[str, Any]:
    axis = {
        "color": "var(--faint)",
        "linecolor": "var(--line)",
        "gridcolor": "var(--line)",
        "zerolinecolor": "var(--faint)",
        "automargin": True,
    }
    return {
        "template": "none",
        "height": HEIGHT,
        "autosize": True,
        "margin": {"l": 8, "r": 8, "t": 12, "b": 8},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "showlegend": False,
        "hovermode": "x unified",
        "hoverlabel": {
            "bgcolor": "var(--box)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)"},
            "namelength": -1,
        },
        "xaxis": {**axis, "showgrid": False, "zeroline": False, "title": {"text": across}},
        "yaxis": {**axis, "title": {"text": plain(up)}},
    }
