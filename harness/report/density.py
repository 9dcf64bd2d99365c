"""Density of a sparse prefill: which share of the causal pairs of queries and keys each layer and head attended to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from harness.report.figures import canvas, names_of
from harness.report.recorded import Recorded

_PANELS = 6


def density(extra: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """`extra["density"]`: [layers, heads], 0 to 1; None where it is not recorded."""
    found = extra.get("density")
    return np.array(found, dtype=float) if found else None


def mean_density(extra: Mapping[str, Any]) -> float:
    """Over all layers and heads; NaN where it is not recorded."""
    found = density(extra)
    return math.nan if found is None else float(found.mean())


def density_map(run: Recorded) -> Figure | None:
    """Layer x head, a panel a method, mean over samples of the longest prompts; None where it is not recorded."""
    frame = run.contenders[[density(extra) is not None for extra in run.contenders["extra"]]]
    if frame.empty:
        return None
    longest = frame[frame["length"] == frame["length"].max()]
    methods = [method for method in run.methods if method in set(longest["method"])][:_PANELS]
    figure = canvas(max(4, 0.8 + 2.4 * len(methods)), 3.4)
    panels = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)[0]
    for axes, method in zip(panels, methods, strict=True):
        image = np.mean(list(longest["extra"][longest["method"] == method].map(density)), axis=0)
        drawn = axes.imshow(image, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{names_of(run.methods)[method]}\nmean {image.mean():.0%}", fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
    figure.colorbar(drawn, ax=panels.tolist(), label="share of causal pairs")
    figure.suptitle(f"Attended to in the prefill, {int(longest['length'].iloc[0])} tokens", fontsize=10)
    figure.supxlabel("query head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    return figure
