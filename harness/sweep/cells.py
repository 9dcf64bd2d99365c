"""From a grid to runs, and from a run to its cells."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.grammar import parse_item
from harness.models.load import describe
from harness.runner.catalog import TASKS, build_tasks, parse_methods
from harness.runner.plan import plan
from harness.runner.spec import RunSpec, WrongOption, folder_name, public_name
from harness.statistics.paired import REFERENCE
from harness.sweep.grid_file import GridFile, MethodGrid
from harness.yaml_file import Entry
from tasks.base import TaskContext


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        folder: name of its folder within the sweep's.
        point: option of a run -> its value here, for the options that are axes.
        spec: what it asks.
    """

    folder: str
    point: dict[str, str]
    spec: RunSpec


@dataclass(frozen=True)
class Sweep:
    """A grid multiplied out.

    Attributes:
        grid: the file.
        runs: in order.
        options: method label -> (method, option -> value) of the options that are axes.
    """

    grid: GridFile
    runs: list[SweepRun]
    options: dict[str, tuple[str, dict[str, str]]]


def multiply(grid: GridFile, data_dir: Path | None = None, redo: str = "") -> Sweep:
    """The runs of a grid; neither the models nor the data that they are about need be here.

    Args:
        grid: the file.
        data_dir: folder of data sets.
        redo: methods to ask again (`harness.runner.changes`).

    Raises:
        InputError: a method, a task or an option that there is not, with the line.
    """
    options = _methods(grid)
    given: dict[str, Any] = {key: entry.text for key, entry in grid.settings.items()}
    given |= {"methods": ",".join(options), "tasks": ",".join(_task(grid, entry) for entry in grid.tasks)}
    runs = []
    for chosen in product(*grid.runs.values()):
        asked = {key: entry.text for key, entry in zip(grid.runs, chosen, strict=True)}
        point = {key: public_name(text) for key, text in asked.items() if len(grid.runs[key]) > 1}
        spec = _spec(grid, given | asked | {"data_dir": data_dir, "redo": redo})
        runs.append(SweepRun(_folder(spec.model, point), point, spec))
    return Sweep(grid, runs, options)


def check(sweep: Sweep, *, elsewhere: bool = False) -> None:
    """Checks all that can be checked without weights, before the first run.

    Args:
        sweep: the grid.
        elsewhere: see `harness.runner.plan.plan`.

    Raises:
        InputError: anything wrong with models, data or how methods fit them, with the line where that is known.
    """
    _check_shapes(sweep.grid)
    _check_data(sweep.grid, sweep.runs[0].spec.data_dir)
    for run in sweep.runs:
        plan(run.spec, elsewhere=elsewhere)


def _methods(grid: GridFile) -> dict[str, tuple[str, dict[str, str]]]:
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for entry in grid.methods:
        for label, chosen in entry.labels():
            if label in found:
                raise grid.wrong(entry.line, f"method {label!r} is listed twice")
            _check_method(grid, entry, label)
            found[label] = (entry.base, chosen)
    if REFERENCE not in found:
        raise grid.wrong(grid.methods[0].line, f"methods lack {REFERENCE!r}, which everything is compared with")
    return found


def _check_method(grid: GridFile, entry: MethodGrid, label: str) -> None:
    try:
        parsed = parse_methods(label)
    except InputError as error:
        raise grid.wrong(entry.line, str(error)) from None
    if len(parsed) != 1:
        raise grid.wrong(entry.line, f"{label!r} are {len(parsed)} methods; give each a line of its own")


def _check_shapes(grid: GridFile) -> None:
    """Whether every method fits every model, while the line is known."""
    for model in grid.runs.get("model", [Entry("smollm2", 1)]):
        try:
            shape = describe(model.text)
        except InputError as error:
            raise grid.wrong(model.line, str(error)) from None
        for method in grid.methods:
            _check_shape(grid, method, shape)


def _check_shape(grid: GridFile, entry: MethodGrid, shape: ModelShape) -> None:
    for label, _ in entry.labels():
        try:
            parse_methods(label)[0].check(shape)
        except InputError as error:
            raise grid.wrong(entry.line, str(error)) from None


def _task(grid: GridFile, entry: Entry) -> str:
    """The task in the command line's grammar, with the grid's lengths where it takes lengths."""
    try:
        item = parse_item(entry.text)
        kind = TASKS.get(item.name)
        kind = kind if item.member is None else kind.of_member(item.member)
    except InputError as error:
        raise grid.wrong(entry.line, str(error)) from None
    if grid.lengths and "lengths" in kind.Options.model_fields and "lengths" not in item.options:
        lengths = "/".join(length.text for length in grid.lengths)
        item = item._replace(options=item.options | {"lengths": lengths})
    return str(item)


def _check_data(grid: GridFile, data_dir: Path | None) -> None:
    """Whether every task has what it asks about, while the line is known."""
    for entry in grid.tasks:
        try:
            build_tasks(_task(grid, entry), TaskContext(data_dir))
        except InputError as error:
            raise grid.wrong(entry.line, str(error)) from None


def _spec(grid: GridFile, given: dict[str, Any]) -> RunSpec:
    try:
        return RunSpec.read(given)
    except WrongOption as error:
        key = error.option
        lines = [entry.line for entry in (*grid.runs.get(key, ()), grid.settings.get(key)) if entry]
        raise grid.wrong(lines[0] if lines else 1, f"{key}: {error.reason}") from None


def _folder(model: str, point: dict[str, str]) -> str:
    """`smollm2`, `smollm2-question=after`."""
    parts = [Path(model).name, *(f"{key}={value}" for key, value in point.items() if key != "model")]
    return folder_name("-".join(parts))
