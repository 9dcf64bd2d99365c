"""How samples arrive: rates of a task, and the same rhythm for everybody."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import TaskContext
from tasks.common.load import Load, load_of


def test_every_rate_is_a_task_of_its_own() -> None:
    tasks = build_tasks("speed:lengths=100/200:rate=1/2.5:most=4", TaskContext())
    assert [task.label for task in tasks] == [
        f"speed:lengths={length}:rate={rate}:most=4" for length in (100, 200) for rate in (1, 2.5)
    ]
    assert [load_of(task) for task in tasks] == [Load(1.0, 4), Load(2.5, 4)] * 2


def test_without_a_rate_one_is_sent_after_the_other() -> None:
    (speed, needle) = build_tasks("speed:lengths=100,needle:lengths=1000", TaskContext())
    assert load_of(speed) is load_of(needle) is None


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    seconds = Load(4.0, 1).arrivals(20_000, 1)
    gaps = [after - before for before, after in pairwise(seconds)]
    assert seconds[0] == 0.0 and min(gaps) > 0
    # Of an exponential distribution mean and standard deviation are the same.
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.02)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.04)


def test_a_seed_is_a_rhythm_at_every_rate() -> None:
    slow, fast, other = Load(1.0, 1).arrivals(9, 7), Load(3.0, 2).arrivals(9, 7), Load(1.0, 1).arrivals(9, 8)
    assert slow == pytest.approx([3 * second for second in fast]) and slow != other
    assert Load(math.inf, 8).arrivals(3, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text", ["rate=0", "rate=-1", "rate=nan", "rate=1/0", "rate=fast", "rate=2:most=0", "most=3", "rate=2:most=many"]
)
def test_what_is_no_rate_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^task speed: [^\n]+$"):
        build_tasks(f"speed:lengths=100:{text}", TaskContext())
