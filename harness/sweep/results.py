"""What a sweep's runs recorded: one row a cell, and for each axis how accuracy and speed go along it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from harness.grammar import parse_item
from harness.report import formats
from harness.report.recorded import Recorded, read
from harness.report.table import Cell, Table, label, number
from harness.statistics.noise import TWIN
from harness.statistics.paired import ALL, REFERENCE, compare
from harness.storage.store import MANIFEST
from harness.sweep.cells import Sweep, SweepRun

_NOTE = (
    "Difference: score minus that of `full` on the same samples, in points; sooner: TTFT of `full` over the method's. "
    "Both paired, with 95 % intervals. Kept: share of the prompt's tokens x layers that the caches held after the "
    "prefill."
)


class Reading(NamedTuple):
    """One point of a plot: where it is on the axis, and effects against full attention with their intervals.

    Attributes:
        x: the axis' value. line: which line of the plot it is on.
        score: mean, in percent. points: difference to full attention (estimate, low, high).
        speed: TTFT ratio (estimate, low, high).
    """

    x: str
    line: str
    score: float
    points: tuple[float, float, float]
    speed: tuple[float, float, float]


@dataclass(frozen=True)
class Axis:
    """One axis of a grid.

    Attributes:
        name: for people and files.
        values: in the grid's order.
        readings: of every line, at every value that has records.
    """

    name: str
    values: list[str]
    readings: list[Reading]

    @property
    def lines(self) -> list[str]:
        """In the order of the readings."""
        return list(dict.fromkeys(reading.line for reading in self.readings))


@dataclass(frozen=True)
class Results:
    """The records of a sweep.

    Attributes:
        sweep: what was asked.
        recorded: run -> its records, of the runs that have any.
    """

    sweep: Sweep
    recorded: list[tuple[SweepRun, Recorded]]

    @cached_property
    def records(self) -> pd.DataFrame:
        """All records; `bare` is the task without its length, `cell` run and task, `run_*` the run's point."""
        frames = []
        for run, found in self.recorded:
            bare = found.contenders["task"].map(without_length)
            frame = found.contenders.assign(
                run=run.folder, bare=bare, cell=run.folder + "\0" + found.contenders["task"]
            )
            frames.append(frame.assign(**{f"run_{key}": value for key, value in run.point.items()}))
        return pd.concat(frames, ignore_index=True)

    def axes(self) -> Iterator[Axis]:
        """Every axis of more than one value."""
        records, grid = self.records, self.sweep.grid
        for key in (key for key, values in grid.runs.items() if len(values) > 1):
            yield self._across(key, f"run_{key}", list(dict.fromkeys(run.point[key] for run, _ in self.recorded)))
        if records["bare"].nunique() > 1:
            yield self._across("task", "bare", list(dict.fromkeys(records["bare"])))
        if len(grid.lengths) > 1:
            lengths = records.assign(length=records["length"].astype(str))
            yield self._across("length", "length", [entry.text for entry in grid.lengths], lengths)
        for method in grid.methods:
            for option in (option for option, values in method.axes.items() if len(values) > 1):
                yield self._along(method.base, option, method.axes[option])

    def _across(self, name: str, column: str, values: list[str], records: pd.DataFrame | None = None) -> Axis:
        """An axis that every method is on: one line a method."""
        records = self.records if records is None else records
        found = [
            _reading(value, method, records[records[column] == value], method)
            for value in values
            for method in self.sweep.options
        ]
        return Axis(name, values, [reading for reading in found if reading is not None])

    def _along(self, base: str, option: str, values: list[str]) -> Axis:
        """An axis of one method: one line for each combination of its other options, and full attention's."""
        found = []
        for value in values:
            found.append(_reading(value, REFERENCE, self.records, REFERENCE))
            for method, (owner, chosen) in self.sweep.options.items():
                if owner == base and chosen.get(option) == value:
                    rest = ":".join(f"{key}={text}" for key, text in chosen.items() if key != option)
                    found.append(_reading(value, rest or base, self.records, method))
        return Axis(f"{self._short(base, option)} {option}", values, [one for one in found if one is not None])

    def _short(self, base: str, option: str) -> str:
        """The method's bare name, where no other entry of the grid varies the same option of it."""
        name = base.partition(":")[0]
        others = [entry for entry in self.sweep.grid.methods if option in entry.axes and entry.base != base]
        return base if any(entry.base.partition(":")[0] == name for entry in others) else name


def collect(sweep: Sweep, folder: Path) -> Results:
    """Reads what there is of a sweep's runs.

    Raises:
        InputError: a run is corrupt.
    """
    present = [run for run in sweep.runs if (folder / run.folder / MANIFEST).is_file()]
    recorded = [(run, read(folder / run.folder)) for run in present]
    return Results(sweep, [(run, found) for run, found in recorded if not found.records.empty])


def table(results: Results) -> Table:
    """One row a cell."""
    axes = [key for key, values in results.sweep.grid.runs.items() if len(values) > 1]
    head = [*axes, "task", "method", "n", "score %", "difference", "TTFT", "sooner", "kept"]
    rows = [
        [*(label(run.point[key]) for key in axes), *_cells(row, found.effects.get((row["task"], row["method"]), {}))]
        for run, found in results.recorded
        for row in found.summary.to_dict("records")
        if row["method"] != TWIN
    ]
    return Table("sweep", "Cells", _NOTE, head, rows, labels=len(axes) + 2)


def without_length(task: str) -> str:
    """A task's label without the lengths that are an axis of their own."""
    item = parse_item(task)
    return str(item._replace(options={key: value for key, value in item.options.items() if key != "lengths"}))


def _cells(row: Mapping[Any, Any], effect: Mapping[str, Any]) -> list[Cell]:
    points = _effect(effect, "score", "difference")
    speed = _effect(effect, "ttft", "ratio")
    return [
        label(row["task"]),
        label(row["method"]),
        number(row["n"], str(row["n"])),
        number(row["score"], formats.score(row["score"])),
        number(points[0], formats.points(*points), *points[1:]),
        number(row["ttft_s"], formats.seconds(row["ttft_s"])),
        number(speed[0], formats.times(speed[0]) + formats.interval(*speed[1:]), *speed[1:]),
        number(row["kept_fraction"], formats.percent(row["kept_fraction"])),
    ]


def _reading(x: str, line: str, records: pd.DataFrame, method: str) -> Reading | None:
    """A method against full attention over some records, every cell (run and task) counting the same."""
    own = records[records["method"] == method]
    if own.empty:
        return None
    score = float(own.groupby("cell")["score"].mean().mean() * 100)
    if method == REFERENCE:
        return Reading(x, line, score, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    both = records[records["method"].isin([method, REFERENCE])]
    rows = compare(both.assign(task=both["cell"]))
    whole = rows[rows["task"] == ALL].to_dict("records")
    effect = {str(key): value for key, value in whole[0].items()} if whole else {}
    return Reading(x, line, score, _effect(effect, "score", "difference"), _effect(effect, "ttft", "ratio"))


def _effect(row: Mapping[str, Any], measure: str, estimate: str) -> tuple[float, float, float]:
    low, high = (float(row.get(f"{measure}_{name}", math.nan)) for name in ("low", "high"))
    return float(row.get(f"{measure}_{estimate}", math.nan)), low, high
