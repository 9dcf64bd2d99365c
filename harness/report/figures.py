"""What all figures share: colours that everyone tells apart, a white ground on any page, PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness.report.plots import short_names, style_of


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches; its ground is white, so that it reads on dark pages and in print."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def colour_of(index: int) -> str:
    """The colour of the method with this place in the run."""
    return style_of(index)[0]


def marker_of(index: int) -> str:
    """Its marker: what tells methods apart without colour."""
    return style_of(index)[1]


def names_of(methods: Sequence[str]) -> dict[str, str]:
    """Label -> the shortest name that no other method has, in one line."""
    names = [name.replace("\n  ", " ") for name in short_names(list(methods))]
    return dict(zip(methods, names, strict=True))


def tidy(axes: Axes) -> None:
    """A faint grid behind what is drawn, no frame."""
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, columns: int = 4) -> None:
    """Names below all panels what the first of them shows, in so many columns at most."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes `NAME.png` and `NAME.svg`; the same figure gives the same bytes."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, metadata={"Software": None})
    # The layout is found; to look for it once more would take half of all the time, and could move things.
    figure.set_layout_engine("none")
    # Outlines instead of text: a paper or a page shows the letters as they are here, whatever fonts it has.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]
