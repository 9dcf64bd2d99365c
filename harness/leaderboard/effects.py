"""Numbers of a board with their intervals: losses, ratios, ranks, and from which length on a method wins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from harness.leaderboard.frame import TIMES
from harness.statistics.estimators import ALPHA, FEWEST, Effect, pairs, speed_effect

DRAWS = 2000
"""Resamples behind the interval of a rank."""
_UNSEEN = 3.0


@dataclass(frozen=True)
class Found:
    """A number with its 95 % interval; NaN where there is none.

    Attributes:
        value, low, high: points of a score, or a ratio.
        samples: pairs behind it; a batch's times are one.
        p: two-sided, of no effect.
        tasks: tasks and lengths behind a loss.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    samples: int = 0
    p: float = math.nan
    tasks: int = 0

    @property
    def sure(self) -> bool:
        """Whether it has an interval."""
        return math.isfinite(self.low)


def loss(rows: pd.DataFrame) -> Found:
    """Mean difference of scores from full attention's, in points; every task and length counts the same.

    A weighted mean of clusters (samples of one context), linearised (Cochran, Sampling Techniques, 1977), with t for as
    many clusters: cells may hold a single sample each, whose spread nobody knows; differences between cells count as
    spread then, which errs on the wide side. As what nobody has seen may still be there, an interval is never narrower
    than 3 in as many samples lost or won (Hanley & Lippman-Hand 1983).
    """
    known = rows[rows["diff"].notna()]
    if known.empty:
        return Found(math.nan)
    weights = 1 / known.groupby("cell")["diff"].transform("size").to_numpy(float)
    weights /= weights.sum()
    values = known["diff"].to_numpy(float)
    mean = float(weights @ values)
    shares = (pd.Series(weights * (values - mean)).groupby((known["cell"] + known["unit"]).to_numpy()).sum()).to_numpy()
    units, tasks = len(shares), int(known["cell"].nunique())
    if units < FEWEST:
        return Found(100 * mean, samples=len(known), tasks=tasks)
    se = math.sqrt(units / (units - 1) * float(shares @ shares))
    half = max(float(stdtrit(units - 1, 1 - ALPHA / 2)) * se, _UNSEEN / units)
    p = float(2 * stdtr(units - 1, -abs(mean) / se)) if se > 0 else 1.0
    return Found(100 * mean, 100 * max(-1.0, mean - half), 100 * min(1.0, mean + half), len(known), p, tasks)


def ratio(rows: pd.DataFrame, measure: str) -> Found:
    """Full attention's time, or bytes, over the method's, at one length; bytes are counted and have no interval."""
    known = rows[rows[measure].notna()]
    units = pd.factorize(known["cell"] + known["unit"])[0]
    timed = [pd.factorize(known[side])[0] for side in ("timed", "full_timed")] if measure in TIMES else []
    effect = speed_effect([pairs(known[measure], units, measure, timed)])
    sure = effect.units >= FEWEST and measure in TIMES and math.isfinite(effect.low)
    value, low, high = (math.exp(end) for end in (effect.estimate, effect.low, effect.high)) if sure else _alone(effect)
    return Found(value, low, high, effect.n, effect.p if sure else math.nan)


def _alone(effect: Effect) -> tuple[float, float, float]:
    return math.exp(effect.estimate) if math.isfinite(effect.estimate) else math.nan, math.nan, math.nan


def ranks(rows: pd.DataFrame) -> dict[str, tuple[int, int, int]]:
    """Entrant -> place by mean score, and the 95 % interval of that place.

    Samples that all entrants answered are resampled within their cells, all entrants together, so that what an easy
    sample gives it gives to everyone (the bootstrap of Efron 1979 on paired data; ranks as Goldstein & Spiegelhalter
    1996 have them). No resample has what nobody has seen, so each mean may also be off by exponential errors whose 95 %
    quantile is the 3 in n of `loss`. Empty where no sample was answered by all.
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
    unseen = generator.exponential(1 / len(table), size=(2, *drawn.shape))
    return means, drawn / len(cells) + unseen[0] - unseen[1]


def _places(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """[draws, m] means -> places from 1, the highest first; equal ones share the better place."""
    places: NDArray[np.int64] = 1 + (means[:, None, :] > means[:, :, None] + 1e-12).sum(2)
    return places


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
