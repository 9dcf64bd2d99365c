"""What so many samples could have found, and how many it takes to find what there may be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import betaincinv, stdtrit
from scipy.stats import binom

from harness.statistics.estimators import ALPHA, FEWEST, SPEED_ALPHA, Effect, trimmed

POWER = 0.8
MOST = 10**6
"""No more samples than this are ever said to be needed."""
LARGEST_RATIO = 10.0
"""Where not even this ratio of times would have been found, nothing is said to be detectable."""

_TAIL = 1e-9


def score_mde(found: Effect, alpha: float = ALPHA) -> float:
    """Smallest true difference of scores that would have been found with 80 % power at `alpha`, as a fraction.

    The larger of two: (t + t) x standard error, t at 1 - alpha/2 and at 0.8 (Bloom 1995); and, as flipping k signs
    cannot give a p below 2^(1-k), the rate at which k differences all of one direction turn up with 80 % power
    (inverse of the binomial tail; Clopper & Pearson 1934), times the mean size of a difference. Infinite where even
    if all samples differed p would stay above alpha, or only more than is possible would have been found.
    """
    if math.isnan(found.se):
        return math.inf
    fewest = math.ceil(1 - math.log2(alpha) - 1e-9)
    if found.units < fewest:
        return math.inf
    rate = float(betaincinv(fewest, found.units - fewest + 1, POWER))
    return _possible(max(rate * found.step, _detectable(found, alpha)), 1.0)


def speed_mde(found: Effect, alpha: float = SPEED_ALPHA) -> float:
    """Smallest true log ratio of times that would have been found with 80 % power at `alpha`; see `score_mde`."""
    if math.isnan(found.se) or found.units < FEWEST:
        return math.inf
    return _possible(_detectable(found, alpha), math.log(LARGEST_RATIO))


def pairs_needed(spread: float, ratio: float = 1.05, alpha: float = SPEED_ALPHA, power: float = 0.95) -> int:
    """Pairs that find a true ratio of times with this power, at least `FEWEST`.

    The usual ((z + z) x spread / effect)^2 with t for z, so that it holds for few pairs too.

    Args:
        spread: standard deviation of the log ratio of a pair; `Effect.se` x sqrt(n) of an earlier run estimates it.
        ratio: the true ratio to be found.
        alpha: two-sided level.
        power: how often it is to be found.
    """
    effect = abs(math.log(ratio))

    def found(number: int) -> bool:
        df = number - 2 * trimmed(number) - 1
        return (_t(df, 1 - alpha / 2) + _t(df, power)) * spread / math.sqrt(number) <= effect

    return _fewest(found)


def flips_needed(lost: float, won: float, alpha: float = ALPHA, power: float = POWER) -> int:
    """Samples with which McNemar's exact test finds these shares of lost and won answers with this power."""
    return _fewest(lambda number: flips_power(number, lost, won, alpha) >= power)


def flips_power(number: int, lost: float, won: float, alpha: float = ALPHA) -> float:
    """How often McNemar's exact test finds more losses than gains among `number` samples.

    Args:
        number: of samples.
        lost, won: shares of all samples, above 0 together.
        alpha: two-sided level.
    """
    share = min(1.0, lost + won)
    least, most = (int(binom.ppf(tail, number, share)) for tail in (_TAIL, 1 - _TAIL))
    changed = np.arange(max(1, least), most + 1)
    near = np.asarray(binom.ppf(alpha / 2, changed, 0.5))
    gains = near - (binom.cdf(near, changed, 0.5) > alpha / 2)
    return float(np.sum(binom.pmf(changed, number, share) * binom.cdf(gains, changed, won / (lost + won))))


def _fewest(found: Callable[[int], bool]) -> int:
    """The least number from `FEWEST` to `MOST` with which it is found, where more never finds less."""
    high = FEWEST
    while high < MOST and not found(high):
        high *= 2
    low = high // 2 if high > FEWEST else high - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return min(high, MOST)


def _possible(size: float, largest: float) -> float:
    return size if size <= largest else math.inf


def _detectable(found: Effect, alpha: float) -> float:
    return (_t(found.df, 1 - alpha / 2) + _t(found.df, POWER)) * found.se


def _t(df: float, quantile: float) -> float:
    return float(stdtrit(df, quantile))
