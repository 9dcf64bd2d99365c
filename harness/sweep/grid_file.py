"""The file of a grid: YAML, read with the line of everything in it, so that every complaint can say where.

    name: relevance          # heading; the file's name if left out
    model: smollm2           # one or a list
    methods:                 # one or a list
      - full
      - lazyllm:keep=0.5/0.25/0.125
      - method: slim         # every combination of the options' values
        options:
          score: [token_softmax, absdot]
          w: [4, 32]
          budgets: [0.75/0.375/0.25, 0.5/0.25/0.125]
    tasks: [needle, retrieval/multikey]
    lengths: [1024, 2048]    # for every task that has lengths; optional
    limit: 10                # and the other options of `harness run`: max_length, seed, question, device, dtype, ...

A list of values is an axis: `model`, `seed`, `question`, `dtype` and `batch` become runs of their own, the rest cells
of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from harness.errors import InputError
from harness.runner.spec import RunSpec
from harness.yaml_file import Entry, Node, read_yaml, wrong

RUN_AXES = ("model", "seed", "question", "dtype", "batch")
"""Options of a run that may be lists: each combination of their values is a run."""
SETTINGS = tuple(sorted(set(RunSpec.model_fields) - {*RUN_AXES, "methods", "tasks", "data_dir", "redo"}))
"""Options of a run that may not."""
KEYS = ("name", "methods", "tasks", "lengths", *RUN_AXES, *SETTINGS)
_METHOD_KEYS = ("method", "options")


@dataclass(frozen=True)
class MethodGrid:
    """One entry of `methods`.

    Attributes:
        base: method, with the options that do not vary, in the command line's grammar.
        axes: option -> its values.
        line: of the entry.
    """

    base: str
    axes: dict[str, list[str]]
    line: int

    def labels(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Every combination: the method's label, and the value of each axis in it."""
        for values in product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            yield ":".join([self.base, *(f"{key}={value}" for key, value in chosen.items())]), chosen


@dataclass(frozen=True)
class GridFile:
    """A grid as its file has it.

    Attributes:
        path: of the file.
        name: heading.
        methods, tasks, lengths: what is crossed in every run; no lengths where tasks decide themselves.
        runs: option of a run -> its values; what the file does not name is not here.
        settings: option of all runs -> its value.
    """

    path: Path
    name: str
    methods: list[MethodGrid]
    tasks: list[Entry]
    lengths: list[Entry]
    runs: dict[str, list[Entry]]
    settings: dict[str, Entry]

    def wrong(self, line: int, message: str) -> InputError:
        """The error for something in a line."""
        return wrong(self.path, line, message)


def read_grid(path: Path) -> GridFile:
    """Reads a grid.

    Raises:
        InputError: no such file, no YAML, an unknown key, an axis without values; with the line.
    """
    root = read_yaml(path)
    parts = root.mapping("the grid", KEYS)
    if "methods" not in parts:
        raise wrong(path, root.line, "the grid has no 'methods'")
    return grid(root, parts, [_method(node) for node in parts["methods"].items("methods")])


def grid(node: Node, parts: Mapping[str, Node], methods: list[MethodGrid]) -> GridFile:
    """The grid that a part of a file describes.

    Args:
        node: that part.
        parts: its keys, `methods` of no account.
        methods: the grid's.

    Raises:
        InputError: no tasks, an axis without values; with the line.
    """
    if "tasks" not in parts:
        raise wrong(node.path, node.line, "the grid has no 'tasks'")
    return GridFile(
        node.path,
        parts["name"].text() if "name" in parts else node.path.stem,
        methods,
        parts["tasks"].entries("tasks"),
        parts["lengths"].entries("lengths") if "lengths" in parts else [],
        {key: parts[key].entries(key) for key in RUN_AXES if key in parts},
        {key: Entry(parts[key].text(), parts[key].line) for key in SETTINGS if key in parts},
    )


def _method(node: Node) -> MethodGrid:
    if not node.is_mapping:
        return MethodGrid(node.text(), {}, node.line)
    parts = node.mapping("the method", _METHOD_KEYS)
    if "method" not in parts:
        raise wrong(node.path, node.line, "this entry has no 'method'")
    base, axes = [parts["method"].text()], {}
    options = parts["options"].mapping("the options", None) if "options" in parts else {}
    for key, value in options.items():
        if value.is_sequence:
            axes[key] = [item.value() for item in value.items(key)]
        else:
            base.append(f"{key}={value.text()}")
    return MethodGrid(":".join(base), axes, node.line)
