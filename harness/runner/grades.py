"""What an answer is worth to its task; a task that fails to say so costs the answer its score, and not the run."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

from harness.runner.faults import told
from tasks.base import Task


class Graded(NamedTuple):
    """An answer and its score.

    Attributes:
        prediction: the answer; None if random weights gave it.
        score: from 0 to 1; None where there is none.
        problem: why the task has no score for it, if it should have one.
    """

    prediction: str | None
    score: float | None
    problem: str | None = None


def grade(task: Task, prediction: str, score: Callable[[], float | None]) -> Graded:
    """Grades an answer.

    Args:
        task: whose score it is.
        prediction: the answer.
        score: asks the task.
    """
    try:
        value = score()
    except Exception as error:  # whatever a third party's code raises
        return Graded(prediction, None, told(task, error))
    if value is None:
        return Graded(prediction, None)
    if isinstance(value, Real) and 0 <= value <= 1:
        return Graded(prediction, float(value))
    return Graded(prediction, None, f"score returned {value!r}; expected 0 to 1, or None"[:300])
