"""What is asked together goes to one process; what is not there of a conversation is asked unrecorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.runner.fan_out import units_of
from harness.runner.orders import Listing
from tests.command import run
from tests.executors.runs import comparable, rows
from tests.runner.test_conversation import asked
from tests.test_cli import random_model

pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.slow]
LOCAL = ("--executor", "local", "--workers", 2)


def both_ways(folder: Path, arguments: list[object]) -> None:
    """Asks in this process, and in two others."""
    assert run(*arguments, "--output", folder / "one") == 0
    assert run(*arguments, *LOCAL, "--output", folder / "two") == 0
    assert comparable(folder / "one") == comparable(folder / "two") != []
    assert len({row["worker"]["process"] for row in rows(folder / "two")}) == 2


def test_turns_are_the_same_where_units_cut_a_conversation(tmp_path: Path) -> None:
    # Nine questions about three contexts, in units of four and five.
    both_ways(tmp_path, [*asked(tmp_path, "full,lazyllm", contexts=3), "--no-timing"])


def test_batches_are_the_same(tmp_path: Path) -> None:
    tasks = "speed:lengths=100:new_tokens=3:repeats=5"
    methods = "full,snapkv:budget=64:window=8"
    both_ways(
        tmp_path, ["run", "--model", random_model(tmp_path), "--methods", methods, "--tasks", tasks, "--batch", 2]
    )
    assert [row["batch"] for row in rows(tmp_path / "two") if row["method"] == "full"] == [2, 2, 2, 2, 1]


def test_units_hold_whole_batches_of_one_task() -> None:
    names = {"a": "12345", "b": "678"}
    keys = {task: [(cell, name) for name in samples for cell in ("x", "y")] for task, samples in names.items()}
    listing, everything = Listing(tasks=list(keys.items())), {key for each in keys.values() for key in each}
    units = units_of(listing, everything, 99, 2)
    assert [unit.samples for unit in units] == [
        {"a": ["1", "2"]}, {"a": ["3", "4"]}, {"a": ["5"]}, {"b": ["6", "7"]}, {"b": ["8"]},
    ]  # fmt: skip
    assert [key for unit in units for key in unit.keys] == [key for each in keys.values() for key in each]
    # A batch of which one record is missing goes out whole, and others do not.
    (unit,) = units_of(listing, {("y", "4")}, 99, 2)
    assert unit.samples == {"a": ["3", "4"]} and len(unit.keys) == 4
    assert len(units_of(listing, everything, 2, 2)) == 2 and units_of(listing, set(), 2, 2) == []


@pytest.mark.parametrize(
    ("samples", "slots", "sizes"), [(40, 2, [10] * 4), (64, 2, [8] * 8), (9, 2, [4, 5]), (3, 4, [1] * 3)]
)
def test_each_place_gets_as_many_units_as_the_others(samples: int, slots: int, sizes: list[int]) -> None:
    keys = [("x", str(number)) for number in range(samples)]
    units = units_of(Listing(tasks=[("a", keys)]), set(keys), slots)
    assert [len(unit.keys) for unit in units] == sizes
