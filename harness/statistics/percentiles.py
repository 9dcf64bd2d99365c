"""Percentiles of waiting times, and how many values one needs before it means something.

The p-th percentile of a population lies below the largest of n values with a probability of 1 - p^n (Wilks 1941). Where
that is less than 95 %, no value that was seen says how high the percentile may be, so none is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from harness.statistics.estimators import ALPHA

PERCENTS = (50, 90, 99)


def fewest(percent: float) -> int:
    """Values that a percentile needs: 5 for the median, 29 for the 90th, 299 for the 99th."""
    return math.ceil(math.log(ALPHA) / math.log(percent / 100))


def percentile(values: ArrayLike, percent: float) -> float:
    """The percentile, interpolated between values as numpy and vLLM do; NaN of fewer than `fewest`."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    return float(np.percentile(known, percent)) if len(known) >= fewest(percent) else math.nan


def pooled(gaps: Sequence[Sequence[float] | None], timed: Sequence[int] | None = None) -> list[float]:
    """The gaps between tokens of all requests; of those whose tokens were not timed, none.

    Args:
        gaps: of each request.
        timed: which requests were timed together (`harness.statistics.together`), and share their gaps: the longest
            answer of them has all. None where each was alone.
    """
    longest: dict[int, Sequence[float]] = {}
    for group, own in zip(range(len(gaps)) if timed is None else timed, gaps, strict=True):
        if isinstance(own, Sequence) and len(own) > len(longest.get(group, ())):
            longest[group] = own
    return [gap for own in longest.values() for gap in own]
