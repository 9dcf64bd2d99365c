from __future__ import annotations

import math

import numpy as np
import pytest

from harness.statistics.percentiles import PERCENTS, fewest, percentile, pooled


def test_how_many_values_a_percentile_needs() -> None:
    assert [fewest(percent) for percent in PERCENTS] == [5, 29, 299]
    for percent in PERCENTS:
        most = (percent / 100) ** (fewest(percent) - 1)
        assert most * percent / 100 <= 0.05 < most


@pytest.mark.parametrize("percent", PERCENTS)
def test_of_fewer_there_is_none(percent: int) -> None:
    enough = list(np.random.default_rng(0).exponential(size=fewest(percent)))
    assert percentile(enough, percent) == np.percentile(enough, percent)
    assert math.isnan(percentile(enough[1:], percent))
    assert math.isnan(percentile([*enough[1:], math.nan], percent))


def test_gaps_of_requests_that_were_not_timed_are_none() -> None:
    assert pooled([[0.1, 0.2], None, [], [0.3]]) == [0.1, 0.2, 0.3]
    # The steps of a batch count once: the longest answer has all of them.
    assert pooled([[0.1], [0.1, 0.2], None, [0.3]], [0, 0, 1, 2]) == [0.1, 0.2, 0.3]
