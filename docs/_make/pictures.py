"""A picture of an objective for light and for dark pages, from one drawing."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from curves import Curves

# Drawn in these colours, which are then replaced as text; the last two are the lines.
_DRAWN = {"ink": "#010101", "faint": "#020202", "first": "#030303", "second": "#040404"}
SCHEMES = {
    "light": {"ink": "#24292f", "faint": "#c3c9d0", "first": "#0b5cad", "second": "#b3261e"},
    "dark": {"ink": "#d8dde3", "faint": "#4a525b", "first": "#79b8ff", "second": "#ff9b93"},
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_dpo",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _DRAWN["ink"],
    "axes.labelcolor": _DRAWN["ink"],
    "axes.edgecolor": _DRAWN["faint"],
    "axes.titlesize": 10,
    "xtick.color": _DRAWN["ink"],
    "ytick.color": _DRAWN["ink"],
    "grid.color": _DRAWN["faint"],
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(found: Curves, folder: Path, name: str) -> None:
    """Write ``name-light.svg`` and ``name-dark.svg``: the loss on the left, its slope on the right."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(6.2, 2.9))
        several = len(found.curves) > 1
        figure.subplots_adjust(
            left=0.1, right=0.985, bottom=0.2, top=0.8 if several else 0.9, wspace=0.25
        )
        for axis, what in zip(axes, ("loss", "gradient"), strict=True):
            for curve, colour, style in zip(
                found.curves, (_DRAWN["first"], _DRAWN["second"]), ("-", "--"), strict=False
            ):
                axis.plot(
                    curve.x, getattr(curve, what), style, color=colour, lw=1.8, label=curve.name
                )
            axis.set_title(what if what == "loss" else "gradient (its slope)")
            axis.axvline(0, color=_DRAWN["faint"], lw=1)
            axis.grid(True)
            axis.ticklabel_format(axis="y", scilimits=(-3, 4))
        figure.supxlabel(found.axis, fontsize=10, y=0.02)
        if several:
            lines, names = axes[0].get_legend_handles_labels()
            figure.legend(lines, names, frameon=False, ncols=2, loc="upper center")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    for scheme, colours in SCHEMES.items():
        text = buffer.getvalue()
        for part, colour in colours.items():
            text = text.replace(_DRAWN[part], colour)
        path = folder / f"{name}-{scheme}.svg"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
