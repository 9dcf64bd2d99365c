"""What one gate of a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["violated", "undecided", "passed"]


@dataclass(frozen=True)
class GateResult:
    """What one gate found.

    Attributes:
        gate: "missing", "prompt", "kept set", "answers", "scorer", "score", "ttft", "tpot", "e2e", "full ttft", ...,
            "energy", "itl_p90", "itl_p99"; "tail" where no answer is long enough for one.
        text: what was found, in words and numbers.
        baseline, now: score in points, speed-up over full, or seconds; for "kept set" tokens x layers.
        low, high: interval of the change: points, or a factor (above 1 is faster).
        bound: in the unit of the interval.
        n, needed: samples compared, and samples that would decide.
        paired: whether they were compared one by one.
    """

    gate: str
    method: str
    task: str
    outcome: Outcome
    text: str
    baseline: float | None = None
    now: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    n: int | None = None
    needed: int | None = None
    paired: bool | None = None

    @property
    def cell(self) -> str:
        """Method and task."""
        return f"{self.method} x {self.task}"

    def __str__(self) -> str:
        word = {"violated": "REGRESSION", "undecided": "undecided", "passed": "passed"}[self.outcome]
        return f"{word}: {self.cell}: {self.text}"
