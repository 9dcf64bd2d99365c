"""What methods score in a run, beside which their throughput is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from harness.errors import InputError
from harness.report.recorded import read
from harness.statistics.paired import ALL


class Accuracy(NamedTuple):
    """Of one method.

    Attributes:
        score: mean over tasks, in percent.
        difference, low, high: from full attention's, in points, with its paired 95 % interval; NaN where unknown.
    """

    score: float
    difference: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, moved to the score."""
        return self.score + self.low - self.difference, self.score + self.high - self.difference


class Judged(NamedTuple):
    """What a run says of accuracy.

    Attributes:
        words: which run.
        methods: label -> what it scores.
    """

    words: str
    methods: Mapping[str, Accuracy]


def judged(folder: Path) -> Judged:
    """Reads a run.

    Raises:
        InputError: the folder is not a run, or has no scores.
    """
    run = read(folder)
    if not run.scored:
        raise InputError(f"{folder} has no scores")
    found = {}
    for row in run.whole.to_dict("records"):
        method = str(row["method"])
        effect = run.effects.get((ALL, method), {})
        parts = (float(effect.get(f"score_{name}", math.nan)) for name in ("difference", "low", "high"))
        found[method] = Accuracy(float(row["score"]), *parts)
    tasks = run.summary["task"].nunique()
    words = f"`{run.name}`, {run.manifest.model}, {tasks} task{'s' * (tasks > 1)}"
    return Judged(words, {method: one for method, one in found.items() if math.isfinite(one.score)})
