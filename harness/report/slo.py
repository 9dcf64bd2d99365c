"""Service level objectives: what the times of a request may be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from harness.errors import InputError

_TIMES = ("ttft", "tpot", "e2e")
_LIMIT = re.compile(r"(\w+)=(\d+(?:\.\d+)?)(ms|s)")


class Limit(NamedTuple):
    """What one time of a request may be.

    Attributes:
        name: ttft, tpot or e2e.
        seconds: at most.
    """

    name: str
    seconds: float


def parse_slo(text: str) -> list[Limit]:
    """The limits of `ttft=2s,tpot=50ms`.

    Raises:
        InputError: anything else, or a time twice.
    """
    found = [_LIMIT.fullmatch(part.strip()) for part in text.split(",")]
    limits = [Limit(one[1], float(one[2]) / (1000 if one[3] == "ms" else 1)) for one in found if one]
    names = {limit.name for limit in limits}
    if len(names) < len(found) or not names <= {*_TIMES} or not all(limit.seconds for limit in limits):
        raise InputError(f"--slo {text!r}: expected ttft=2s,tpot=50ms,e2e=5s, some of them, once each and above 0")
    return limits


def good(times: pd.DataFrame, slo: Sequence[Limit]) -> pd.Series[bool]:
    """Which requests keep every limit.

    Args:
        times: columns `ttft_s`, `tpot_s` (vLLM's) and `e2e_s`, NaN where there is no answer.
        slo: the limits.
    """
    kept = times["e2e_s"].notna()
    for limit in slo:
        seconds = times[f"{limit.name}_s"]
        kept &= (seconds <= limit.seconds) | ((limit.name == "tpot") & seconds.isna())
    return kept
