"""Numbers and circumstances in words for people; null is always "-"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from harness.statistics.paired import SPEEDS
from harness.storage.store import Manifest

NOTHING = "-"


def seconds(value: Any) -> str:
    """`532 ms`, `2.41 s`: three digits."""
    if pd.isna(value):
        return NOTHING
    return f"{_digits(value * 1000)} ms" if value < 0.9995 else f"{_digits(value)} s"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def joules(value: Any) -> str:
    """`312 J`, `1.25 kJ`, `840 mJ`: three digits."""
    if pd.isna(value):
        return NOTHING
    if value < 0.9995:
        return f"{_digits(value * 1000)} mJ"
    return f"{_digits(value)} J" if value < 999.5 else f"{_digits(value / 1000)} kJ"


def cost(name: str) -> str:
    """Heading of a cost of `harness.statistics.paired`: `TTFT`, `energy`."""
    return name.upper() if name in SPEEDS else name


def size(value: Any) -> str:
    """`513 MiB`, `1.25 GiB`: three digits, binary units."""
    if pd.isna(value):
        return NOTHING
    amount, units = float(value), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while amount >= 999.5 and (larger := next(units, None)):
        amount, unit = amount / 1024, larger
    return f"{_digits(amount)} {unit}"


def rate(value: Any) -> str:
    """`41.3`, `1830`: three digits, more where they are ahead of the point."""
    return NOTHING if pd.isna(value) else f"{value:.0f}" if value >= 999.5 else _digits(value)


def times(value: Any) -> str:
    """`1.53x`."""
    return NOTHING if pd.isna(value) else f"{value:.2f}x"


def percent(value: Any) -> str:
    """`43 %`, of a fraction."""
    return NOTHING if pd.isna(value) else f"{value * 100:.0f} %"


def score(value: Any) -> str:
    """`91.7`, of a score in percent."""
    return NOTHING if pd.isna(value) else f"{value:.1f}"


def interval(low: Any, high: Any) -> str:
    """`[1.45, 1.61]`, three digits; empty where there is none."""
    return "" if pd.isna(low) or pd.isna(high) else f" [{_digits(low)}, {_digits(high)}]"


def points(value: Any, low: Any, high: Any) -> str:
    """`-4.2 [-9.1, 0.8]`, of points of a score."""
    if pd.isna(value):
        return NOTHING
    ends = "" if pd.isna(low) else f" [{low:.1f}, {high:.1f}]"
    return f"{value:+.1f}{ends}".replace("-0.0", "0.0").replace("+0.0", "0.0")


def probability(value: Any) -> str:
    """`0.042`, `< 0.001`."""
    if pd.isna(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def called(verdict: Any, mde: Any, write: Callable[[float], str]) -> str:
    """A verdict, and beside one that found nothing what would have been found: `no difference (MDE 1.4)`."""
    if pd.isna(verdict):
        return NOTHING
    if verdict in ("better", "worse", "within noise"):
        return str(verdict)
    return f"{verdict} (MDE {write(mde)})" if math.isfinite(mde) else f"{verdict} (too few samples)"


def excess(value: float) -> str:
    """`4.2 %`, of a ratio of 1.042."""
    return f"{_digits((value - 1) * 100)} %"


def status(manifest: Manifest) -> str | None:
    """Why the numbers are not those of a whole run; None if they are."""
    if manifest.status == "complete":
        return None
    if manifest.status == "running":
        return "This run has not ended, or was killed."
    return f"This run is incomplete: {'; '.join(manifest.reasons) or 'no reason is recorded'}."


def device(manifest: Manifest) -> str:
    """The chip that did the work: the GPU's name, or the processor's with its cores."""
    environment = manifest.environments[-1] if manifest.environments else {}
    gpus, cpu = environment.get("cuda") or [], environment.get("cpu") or {}
    if manifest.device.startswith("cuda"):
        return str(gpus[0]["name"]) if gpus else manifest.device
    return f"{cpu.get('model') or 'CPU'} ({cpu['usable']} cores)" if cpu.get("usable") else "CPU"


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # before the digits are counted: 9.996 is 10.0
    return f"{rounded:.{max(0, 3 - len(str(int(rounded))))}f}"


def protocol(manifest: Manifest) -> str:
    """Where the question was, which decides what methods that look at it can do."""
    if manifest.spec.get("question") == "after":
        return "The question came after the context, which was pruned without it (`--question after`)."
    return "The question was part of the pruned prompt (`--question prompt`)."
