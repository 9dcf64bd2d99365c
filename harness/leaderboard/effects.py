"""Numbers of a board with their intervals: losses, ratios, ranks, and from which length on a method wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.statistics.estimators import FEWEST, Effect, Pairs, pairs, score_effect, speed_effect

DRAWS = 2000
"""Resamples behind the interval of a rank."""


@dataclass(frozen=True)
class Found:
    """A number with its 95 % interval; NaN where there is none.

    Attributes:
        value, low, high: points of a score, or a ratio.
        samples: pairs behind it.
        p: two-sided, of no effect.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    samples: int = 0
    p: float = math.nan

    @property
    def sure(self) -> bool:
        """Whether it has an interval."""
        return math.isfinite(self.low)


def loss(rows: pd.DataFrame) -> Found:
    """Mean difference of scores from full attention's, in points; tasks and lengths count the same."""
    effect = _of_enough(rows, "diff", score_effect)
    return _found(effect, lambda value: 100 * value)


def ratio(rows: pd.DataFrame, measure: str) -> Found:
    """Full attention's time, or bytes, over the method's; tasks and lengths count the same."""
    effect = _of_enough(rows, measure, speed_effect)
    return _found(effect, math.exp)


def _of_enough(rows: pd.DataFrame, column: str, estimate: Callable[[Sequence[Pairs]], Effect]) -> Effect:
    """The effect; of fewer than `FEWEST` units its estimate alone."""
    effect = estimate(_tasks(rows, column))
    return effect if effect.units >= FEWEST else Effect(effect.n, effect.units, effect.estimate)


def _tasks(rows: pd.DataFrame, column: str) -> list[Pairs]:
    """Cells. Those of one unit have no spread: a kind's are one task together, and one that is left is left out."""
    rows = rows[rows[column].notna()]
    units = rows.groupby("cell")["unit"].transform("nunique")
    rows = rows.assign(name=rows["cell"].where(units > 1, "single " + rows["kind"]), one=rows["cell"] + rows["unit"])
    groups = [(str(name), part) for name, part in rows.groupby("name", sort=False)]
    several = [(name, part) for name, part in groups if part["one"].nunique() > 1] or groups
    return [pairs(part[column], pd.factorize(part["one"])[0], name) for name, part in several]


def _found(effect: Effect, scale: Callable[[float], float]) -> Found:
    value, low, high = (
        scale(end) if math.isfinite(end) else math.nan for end in (effect.estimate, effect.low, effect.high)
    )
    return Found(value, low, high, effect.n, effect.p)


def ranks(rows: pd.DataFrame) -> dict[str, tuple[int, int, int]]:
    """Entrant -> place by mean score, and the 95 % interval of that place.

    Samples that all entrants answered are resampled within their cells, all entrants together, so that what an easy
    sample gives it gives to everyone (the bootstrap of Efron 1979 on paired data; ranks as Goldstein & Spiegelhalter
    1996 have them). Empty where no sample was answered by all.
    """
    table = rows.pivot_table(index=["cell", "sample"], columns="entrant", values="score", aggfunc="first")
    table = table[sorted(set(rows["entrant"]))].dropna() if not table.empty else table
    if table.empty:
        return {}
    means, drawn = _means(table)
    places, low, high = _places(means[None])[0], *np.quantile(_places(drawn), [0.025, 0.975], axis=0, method="nearest")
    return {
        str(name): (int(place), int(first), int(last))
        for name, place, first, last in zip(table.columns, places, low, high, strict=True)
    }


def _means(table: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over cells of entrants, [m], and of `DRAWS` resamples, [draws, m]."""
    generator = np.random.default_rng(0)
    cells = [part.to_numpy(float) for _, part in table.groupby(level="cell")]
    means = np.mean([cell.mean(0) for cell in cells], axis=0)
    drawn = np.zeros((DRAWS, table.shape[1]))
    for cell in cells:
        weights = generator.multinomial(len(cell), np.full(len(cell), 1 / len(cell)), size=DRAWS)
        drawn += weights @ cell / len(cell)
    return means, drawn / len(cells)


def _places(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """[draws, m] means -> places from 1, the highest first; equal ones share the better place."""
    return 1 + (means[:, None, :] > means[:, :, None] + 1e-12).sum(2)


def wins_from(rows: pd.DataFrame, measure: str) -> tuple[int | None, bool]:
    """The shortest recorded length from which on a method is faster, or smaller, than full attention at every one.

    Returns:
        The length, None where it never is at the longest; and whether intervals say so at all of these lengths.
    """
    found, sure = None, True
    for length in sorted(set(rows["length"]), reverse=True):
        here = ratio(rows[rows["length"] == length], measure)
        # Bytes are counted: those of equal prompts are equal, and need no interval.
        least = here.low if here.sure else here.value
        if not least > 1:
            break
        found, sure = int(length), sure and (here.sure or measure == "kv")
    return found, sure
