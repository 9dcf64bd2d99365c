"""How many samples a study takes to find a loss, and how small a loss those that it asks would show.

The mean of n paired differences of scores with standard deviation s is told from 0 with 80 % power if it is at least
(t + t) s / sqrt(n), t at 1 - alpha/2 and at 0.8 (Bloom 1995), alpha shared out among the methods (Bonferroni; Holm's
first step, which is what the tables adjust by, is the same). Where few samples differ at all, that is too small: a loss
of less than 3 in n is in none of n samples one time in twenty (Hanley & Lippman-Hand 1983).
"""

from __future__ import annotations

import math

from scipy.special import ndtri

from harness.statistics.estimators import ALPHA
from harness.statistics.power import POWER

_UNSEEN = 3.0


def detectable(samples: int, spread: float, methods: int) -> float:
    """Smallest mean loss, as a fraction of the score, that so many paired samples find.

    Args:
        samples: of all tasks together.
        spread: standard deviation of a paired difference.
        methods: compared with full attention at a time.
    """
    return max(_quantiles(methods) * spread / math.sqrt(samples), _UNSEEN / samples) if samples else math.inf


def samples_for(loss: float, spread: float, methods: int) -> int:
    """Paired samples that find a mean loss of that fraction; see `detectable`."""
    return math.ceil((_quantiles(methods) * spread / loss) ** 2)


def _quantiles(methods: int) -> float:
    return float(ndtri(1 - ALPHA / (2 * max(1, methods))) + ndtri(POWER))
