"""Effects of one method against another, from paired values: estimate, interval, p and what could have been seen.

Everything is paired: the same sample, answered by both methods, a moment apart. That takes out what the two share, most
of the spread: how hard a sample is, how long its prompt is, how busy the machine was.

**Scores** are averaged, so their effect is a mean of differences. Its interval is a Bayesian bootstrap with a part of a
pair that nobody has seen; it was chosen by simulated coverage (docs/statistics.md): where few answers differ, Student's
interval and every bootstrap of the pairs that were seen hold the truth too seldom, as they know of no other pairs.

**Times** are compared as logarithms of ratios, so that twice as fast and twice as slow are equally far from 1 and one
ratio of 20 (a run that the machine interrupted) does not outweigh twenty of 1. The order within pairs changes from pair
to pair, so a steady drift gives to some what it takes from others. The effect is a trimmed mean: of 20 pairs or more,
the fifth at each end (of 10 or more, the tenth; of fewer, none) is left out of the mean and, winsorised, kept in the
interval (Tukey & McLaughlin 1963).

Where values come in clusters (samples that share a context), clusters are resampled, flipped or trimmed, not samples.
Times of requests that were decoded together are one pair, their mean: they share their steps. Several tasks are strata:
each counts the same, and each is resampled on its own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from scipy.stats import binomtest

Floats = NDArray[np.float64]

ALPHA = 0.05
SPEED_ALPHA = 0.01
RESAMPLES = 2000
FEWEST = 6
"""Units below which nothing is called better or worse: even if all fell to one side, p would be 2^(1-5) > `ALPHA`."""

# Weight of the unseen pair: the least with which intervals of lost answers hold the truth 95 % of the time at worst.
_UNSEEN = 0.7
# Sign flips are enumerated up to 2^13, drawn up to 500 units, and normal beyond, where that is the same.
_ENUMERATED, _DRAWN, _FLIPS = 13, 500, 9999
_CHUNK = 1 << 21
_EQUAL = 1e-12


class Effect(NamedTuple):
    """What was found, on a scale where 0 is no effect and more is better; what is not known is NaN.

    Attributes:
        n: pairs.
        units: independent units among them: clusters, or the pairs themselves.
        estimate: score difference as a fraction, or log of a ratio of times.
        low, high: ends of the confidence interval.
        p: two-sided, of no effect; not adjusted for the company it keeps.
        se: standard error of the estimate.
        df: degrees of freedom of `se`.
        step: mean size of the unit differences that are not 0, 1 if all are; of scores alone.
        test: name of the test behind `p`.
    """

    n: int
    units: int
    estimate: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    se: float = math.nan
    df: float = math.nan
    step: float = math.nan
    test: str = ""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Paired values of one task.

    Attributes:
        values: [n] differences of scores (-1 to 1), or logs of ratios of times.
        units: [n] which cluster each pair is of, any integers.
        label: makes the resamples of this task others than those of the next, and the same in every run.
    """

    values: Floats
    units: NDArray[np.int64]
    label: str = ""

    @cached_property
    def sums(self) -> Floats:
        """[units] sum of the values of each unit."""
        return np.bincount(self._codes, self.values, len(self.counts)).astype(float)

    @cached_property
    def counts(self) -> Floats:
        """[units] pairs in each unit."""
        return np.bincount(self._codes).astype(float)

    @cached_property
    def medians(self) -> Floats:
        """[units] median value of each unit: one interrupted run in a cluster moves it little."""
        if len(self.counts) == len(self.values):
            return self.values
        return np.array([np.median(self.values[self._codes == code]) for code in range(len(self.counts))])

    @property
    def mean(self) -> float:
        """Mean over pairs."""
        return float(self.values.mean()) if len(self.values) else math.nan

    @property
    def residuals(self) -> Floats:
        """[units] what each unit adds to the mean, times n: linearisation of a ratio of sums."""
        return self.sums - self.mean * self.counts

    @property
    def constant(self) -> bool:
        """Whether all units are the same."""
        return bool(np.abs(self.residuals).max() < _EQUAL)

    @property
    def right_or_wrong(self) -> bool:
        """Whether every pair is a unit, and won, lost or unchanged as a whole."""
        size = np.abs(self.values)
        whole = np.all((size < _EQUAL) | (np.abs(size - 1) < _EQUAL))
        return bool(whole) and len(self.counts) == len(self.values)

    def resampled(self, seed: int) -> tuple[Floats, Floats]:
        """Means of units weighed at random, [RESAMPLES] each: with the unseen pair lost, and with it won."""
        if seed not in self._resampled:
            self._resampled[seed] = _resample(self, seed)
        return self._resampled[seed]

    @cached_property
    def _codes(self) -> NDArray[np.int64]:
        return np.unique(self.units, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def _resampled(self) -> dict[int, tuple[Floats, Floats]]:
        return {}


def pairs(values: ArrayLike, units: ArrayLike | None = None, label: str = "", timed: Sequence[ArrayLike] = ()) -> Pairs:
    """Pairs whose values are known; NaN and infinite ones are left out.

    Args:
        values: [n].
        units: [n] integers; None where each pair stands for itself.
        label: see `Pairs`.
        timed: of each side of the pairs, [n] integers: which of its requests were timed together
            (`harness.statistics.together`). Pairs that share any are one pair, whose value is their mean.
    """
    numbers = np.asarray(values, dtype=float)
    codes = np.arange(len(numbers)) if units is None else np.asarray(units)
    known = np.isfinite(numbers)
    numbers, codes = numbers[known], codes[known].astype(np.int64)
    sides = [np.asarray(side)[known] for side in timed]
    if any(len(np.unique(side)) < len(side) for side in sides):
        readings = joined(*sides)
        _, first, which = np.unique(readings, return_index=True, return_inverse=True)
        numbers, codes = np.bincount(which, numbers) / np.bincount(which), joined(codes, readings)[first]
    return Pairs(numbers, codes, label)


def joined(*columns: ArrayLike) -> NDArray[np.int64]:
    """Clusters of rows that have a number of any column in common, be it through other rows.

    Args:
        columns: [n] integers each, at least one column.

    Returns:
        [n] the first row of each row's cluster.
    """
    codes = [np.unique(column, return_inverse=True)[1] for column in columns]
    found, before = np.arange(len(codes[0])), np.array([-1])
    while not np.array_equal(found, before):
        before = found
        for code in codes:
            least = np.full(len(code), len(code))
            np.minimum.at(least, code, found)
            found = least[code]
    return found


def score_effect(tasks: Sequence[Pairs], confidence: float = 1 - ALPHA, seed: int = 0) -> Effect:
    """Mean difference of scores, every task counting the same.

    The interval is a Bayesian bootstrap over units (Rubin 1981): percentiles of means whose weights are exponential.
    As nobody has seen all pairs, a part of one more, of Gamma(0.7) weight, is lost in the lower end and won in the
    upper one: with n pairs that are all the same, others may make up 3/n (Hanley & Lippman-Hand 1983). A whole one
    would make Gaffke's (2005) bound for means, which covers 99 % and more. Ends of several tasks are put together as
    the squares of their distances from the estimates (Zou & Donner 2008).

    p is McNemar's (1947) in its exact form for right-or-wrong answers of one task without clusters, else of a
    permutation test that flips the signs of whole units (Fisher 1935), of which McNemar's is a special case.

    Args:
        tasks: differences of scores, method minus reference, -1 to 1.
        confidence: of the interval.
        seed: of resampling and of sign flips.
    """
    found = _blank(tasks, [task.mean for task in tasks])
    if _too_few(tasks):
        return found
    number = len(tasks)
    variance = sum(map(_variance, tasks)) / number**2
    found = found._replace(se=math.sqrt(variance), df=float(found.units - number), step=_step(tasks))
    low, high = _score_interval(tasks, found, confidence, seed)
    p, test = score_p(tasks, seed)
    return found._replace(low=max(-1.0, low), high=min(1.0, high), p=p, test=test)


def score_p(tasks: Sequence[Pairs], seed: int = 0) -> tuple[float, str]:
    """p of no difference between scores, and the name of the test; see `score_effect`."""
    if _too_few(tasks):
        return math.nan, ""
    task = tasks[0]
    if len(tasks) == 1 and task.right_or_wrong:
        return mcnemar(int((task.values < -0.5).sum()), int((task.values > 0.5).sum())), "McNemar"
    shares = np.concatenate([task.sums / (len(task.values) * len(tasks)) for task in tasks])
    return sign_flip(shares, seed), "sign flip"


def speed_effect(tasks: Sequence[Pairs], confidence: float = 1 - ALPHA) -> Effect:
    """Trimmed mean of log ratios of times, every task counting the same.

    95 % intervals of 5 to 50 pairs held the truth 94 to 100 % of the time on simulated machines with lognormal noise, a
    drift of 20 % and up to a tenth of the runs interrupted (`python -m harness.statistics.bench coverage`, 4000
    repeats; table in docs/statistics.md). Where more pairs are interrupted than are trimmed, intervals get wide, not
    wrong. Over several tasks the squared errors add up, with Welch's (1947) degrees of freedom.

    Ratios that are all equal give no interval: no clock is that exact, so something other than time was measured.

    Args:
        tasks: logs of (time of the reference / time of the method).
        confidence: of the interval.
    """
    parts = [trimmed_mean(task.medians) for task in tasks]
    found = _blank(tasks, [mean for mean, _, _ in parts])
    variances = np.array([se**2 for _, se, _ in parts])
    if _too_few(tasks) or not np.all(variances > 0):
        return found
    df = float(variances.sum() ** 2 / sum(v**2 / df for v, (_, _, df) in zip(variances, parts, strict=True)))
    se = float(np.sqrt(variances.sum())) / len(tasks)
    half = _t(df, (1 + confidence) / 2) * se
    low, high = found.estimate - half, found.estimate + half
    p = float(2 * stdtr(df, -abs(found.estimate) / se))
    return found._replace(low=low, high=high, p=p, se=se, df=df, test="trimmed t")


def mcnemar(losses: int, gains: int) -> float:
    """Exact p of McNemar's test (McNemar 1947): are as many answers lost as gained?

    A large p does not mean that the methods answer alike: as many may be lost as gained, or too few differ to tell.

    Args:
        losses: samples that only the reference answers.
        gains: samples that only the method answers.
    """
    return float(binomtest(gains, losses + gains).pvalue) if losses + gains else 1.0


def sign_flip(values: Floats, seed: int = 0) -> float:
    """p of a permutation test: how often does flipping signs by chance give a sum as far from 0 (Fisher 1935)?

    All flips up to 13 values that are not 0; 9999 random ones, the observed among them (Phipson & Smyth 2010), up to
    500; beyond, the normal distribution that the sum then has.
    """
    moved = values[np.abs(values) > _EQUAL]
    size = len(moved)
    if not size:
        return 1.0
    least = abs(moved.sum()) * (1 - 1e-9)
    if size > _DRAWN:
        return float(2 * ndtr(-abs(moved.sum()) / np.linalg.norm(moved)))
    if size <= _ENUMERATED:
        return float(np.mean(np.abs(_all_signs(size) @ moved) >= least))
    signs = np.random.default_rng(seed).integers(0, 2, (_FLIPS, size), dtype=np.int8) * 2.0 - 1
    return float((1 + (np.abs(signs @ moved) >= least).sum()) / (1 + _FLIPS))


def trimmed_mean(values: Floats) -> tuple[float, float, float]:
    """Trimmed mean of [n] values, its standard error and degrees of freedom (Tukey & McLaughlin 1963; Yuen 1974)."""
    number = len(values)
    if number < 2:
        return (float(values[0]) if number else math.nan), math.nan, math.nan
    cut = trimmed(number)
    ordered = np.sort(values)
    inner = ordered[cut : number - cut]
    spread = float(np.clip(ordered, inner[0], inner[-1]).std(ddof=1))
    spread = spread if spread > _EQUAL else 0.0
    return float(inner.mean()), spread / ((1 - 2 * cut / number) * math.sqrt(number)), float(len(inner) - 1)


def holm(p: ArrayLike) -> Floats:
    """Holm's (1979) step-down adjustment: at most alpha of families have any p below alpha by chance.

    Args:
        p: any shape of p values of one family; NaN ones are no part of it.
    """
    values = np.asarray(p, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values.flat[known], kind="stable")]
    steps = values.flat[order] * np.arange(len(order), 0, -1)
    adjusted.flat[order] = np.minimum(1, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


def _blank(tasks: Sequence[Pairs], estimates: Sequence[float]) -> Effect:
    number = sum(len(task.values) for task in tasks)
    units = sum(len(task.counts) for task in tasks)
    return Effect(number, units, float(np.mean(estimates)) if estimates else math.nan)


def _too_few(tasks: Sequence[Pairs]) -> bool:
    return not tasks or any(len(task.counts) < 2 for task in tasks)


def _t(df: float, quantile: float) -> float:
    return float(stdtrit(df, quantile))


def _variance(task: Pairs) -> float:
    """Of a mean; of one whose units are all the same, what its interval says rather than 0."""
    units = len(task.counts)
    if task.constant:
        return float((_unseen(units, ALPHA) * (1 + abs(task.mean)) / ndtri(1 - ALPHA / 2)) ** 2)
    return float(units / (units - 1) * (task.residuals**2).sum() / len(task.values) ** 2)


def _unseen(units: int, alpha: float) -> float:
    """Largest share of units that differ when, at this level, none of so many does."""
    return float(1 - alpha ** (1 / units))


def _step(tasks: Sequence[Pairs]) -> float:
    means = np.concatenate([np.abs(task.sums / task.counts) for task in tasks])
    moved = means[means > _EQUAL]
    return float(moved.mean()) if len(moved) else 1.0


def _score_interval(tasks: Sequence[Pairs], found: Effect, confidence: float, seed: int) -> tuple[float, float]:
    ends = np.array([_ends(task, (1 - confidence) / 2, seed) for task in tasks])
    means = np.array([task.mean for task in tasks])
    down, up = np.linalg.norm(ends - means[:, None], axis=0) / len(tasks)
    return found.estimate - float(down), found.estimate + float(up)


def _ends(task: Pairs, tail: float, seed: int) -> tuple[float, float]:
    lost, won = task.resampled(seed)
    return min(task.mean, float(np.quantile(lost, tail))), max(task.mean, float(np.quantile(won, 1 - tail)))


def _resample(task: Pairs, seed: int) -> tuple[Floats, Floats]:
    units = len(task.counts)
    generator = np.random.default_rng([seed, zlib.crc32(task.label.encode())])
    unseen = generator.standard_gamma(_UNSEEN, RESAMPLES) * task.counts.mean()
    sums, counts = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    rows = max(1, _CHUNK // units)
    for start in range(0, RESAMPLES, rows):
        part = slice(start, min(start + rows, RESAMPLES))
        weights = generator.standard_exponential((part.stop - start, units))
        sums[part], counts[part] = weights @ task.sums, weights @ task.counts
    return (sums - unseen) / (counts + unseen), (sums + unseen) / (counts + unseen)


def trimmed(number: int) -> int:
    """Pairs left out at each end. Trimming a fifth of fewer than 20 covers 93 %, so less is trimmed there."""
    return number // 5 if number >= 20 else number // 10


@lru_cache(maxsize=_ENUMERATED)
def _all_signs(size: int) -> Floats:
    bits = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
    return (bits * 2 - 1).astype(float)
