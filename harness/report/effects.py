"""Cells that say what a method does beside full attention."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from harness.report import formats
from harness.report.table import Cell, number


def ratio(effect: dict[str, Any], measure: str, leads: bool) -> Cell:
    """A ratio to full attention with its interval, from a row of the comparison."""
    value, low, high = (effect.get(f"{measure}_{name}", math.nan) for name in ("ratio", "low", "high"))
    return number(value, formats.times(value) + formats.interval(low, high), low, high, leads)


def verdict(effect: dict[str, Any], measure: str) -> Cell:
    """What the paired test says, in a word."""
    name = "difference" if measure == "score" else "ratio"
    if not effect or pd.isna(effect[f"{measure}_{name}"]):
        return Cell(formats.NOTHING)
    write = formats.score if measure == "score" else formats.excess
    word = effect[f"{measure}_verdict"]
    return Cell(formats.called(word, effect[f"{measure}_mde"], write), word)
