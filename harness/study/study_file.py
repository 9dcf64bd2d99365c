"""The file of a study: YAML, parts that are grids like a sweep's, and methods whose options are found by budget.

name: the field                    # heading; the file's name if left out
model: smollm2                     # of parts that name none; --model is another
points: 3                          # loss that the samples are to find, in points over all tasks
spread: 0.3                        # standard deviation of a paired difference of scores, for that
budgets: [0.25, 0.5, 0.125]        # most important first: share of prompt tokens kept, mean over layers and KV heads
notes: [slim prunes early here]    # what a reader of the page has to know, a text each
methods:
- full                           # without braces: fixed options, run at the first budget alone (full at each)
- snapkv:budget={}               # {}: the share that meets the budget; {0.5}: half of it; {t}: in tokens
- 0.5: slim:budgets={}/{0.5}/{0.33}         # another text for each budget
0.25: slim:layers=4/8/12:budgets={}/{0.5}/{0.33}
parts:                             # at each budget in this order
- name: needles
tasks: [needle, retrieval/multikey]
lengths: [4096, 16384]         # each is runs of its own; `length` where tasks have none: what to match at
question: [prompt, after]
limit: 5                       # samples a task, and other options of `harness run`
methods: [full, slim]          # of this part alone; without braces there is no budget
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError
from harness.statistics.paired import REFERENCE
from harness.sweep.grid_file import KEYS, GridFile, grid
from harness.yaml_file import Entry, Node, read_yaml, wrong

_KEYS = ("name", "model", "points", "spread", "budgets", "notes", "methods", "parts")
_PART_KEYS = (*KEYS, "budgets", "length")
_LENGTH = Entry("8192", 1)


@dataclass(frozen=True)
class MethodEntry:
    """One entry of `methods`.

    Attributes:
        templates: budget as written -> the method, with braces where numbers are to be found.
        line: of the entry.
    """

    templates: dict[str, Entry]
    line: int


@dataclass(frozen=True)
class Part:
    """One part: a grid without methods.

    Attributes:
        grid: its tasks, run options and settings.
        methods: of its own, or the study's.
        budgets: as written, most important first; none where no method has braces.
        length: prompt tokens to match options at, where tasks have no lengths.
    """

    grid: GridFile
    methods: list[MethodEntry]
    budgets: list[Entry]
    length: Entry


@dataclass(frozen=True)
class StudyFile:
    """A study as its file has it."""

    path: Path
    name: str
    points: float
    spread: float
    budgets: list[str]
    parts: list[Part]
    notes: list[str]

    def wrong(self, line: int, message: str) -> InputError:
        """The error for something in a line."""
        return wrong(self.path, line, message)


def read_study(path: Path, model: str | None = None) -> StudyFile:
    """Reads a study.

    Args:
        path: of the file.
        model: instead of the file's.

    Raises:
        InputError: no such file, no YAML, an unknown key, a budget that is no share, a part without tasks; with the
            line.
    """
    root = read_yaml(path)
    keys = root.mapping("the study", _KEYS)
    for key in ("budgets", "methods", "parts"):
        if key not in keys:
            raise wrong(path, root.line, f"the study has no {key!r}")
    budgets = _budgets(keys["budgets"])
    chosen = Entry(model, root.line) if model else _entry(keys.get("model"))
    methods = _methods(keys["methods"], budgets)
    parts = [_part(node, chosen, methods, budgets) for node in keys["parts"].items("parts")]
    _distinct(path, parts)
    return StudyFile(
        path,
        keys["name"].text() if "name" in keys else path.stem,
        _number(keys.get("points"), 3.0),
        _number(keys.get("spread"), 0.3),
        [entry.text for entry in budgets],
        parts,
        [" ".join(item.text().split()) for item in keys["notes"].items("notes")] if "notes" in keys else [],
    )


def _methods(node: Node, budgets: list[Entry]) -> list[MethodEntry]:
    found = [_method(item, [entry.text for entry in budgets]) for item in node.items("methods")]
    texts = {entry.text for method in found for entry in method.templates.values()}
    if REFERENCE not in texts:
        raise wrong(node.path, node.line, f"methods lack {REFERENCE!r}, which everything is compared with")
    return found


def _method(node: Node, budgets: list[str]) -> MethodEntry:
    if node.is_mapping:
        parts = node.mapping("the method's budgets", budgets)
        return MethodEntry({key: Entry(part.text(), part.line) for key, part in parts.items()}, node.line)
    entry = Entry(node.text(), node.line)
    everywhere = "{" in entry.text or entry.text == REFERENCE
    return MethodEntry(dict.fromkeys(budgets if everywhere else budgets[:1], entry), node.line)


def _part(node: Node, model: Entry | None, methods: list[MethodEntry], budgets: list[Entry]) -> Part:
    keys = node.mapping("the part", _PART_KEYS)
    if "name" not in keys:
        raise wrong(node.path, node.line, "this part has no 'name'")
    found = grid(node, keys, [])
    if model is not None:
        found.runs.setdefault("model", [model])
    if "methods" in keys:
        methods = _methods(keys["methods"], budgets)
    matched = any("{" in entry.text for method in methods for entry in method.templates.values())
    if "budgets" in keys and not matched:
        raise wrong(node.path, keys["budgets"].line, "no method of this part has braces, so it has no budget")
    own = _budgets(keys["budgets"]) if "budgets" in keys else budgets if matched else []
    known = [entry.text for entry in budgets]
    for entry in own:
        if entry.text not in known:
            raise wrong(node.path, entry.line, f"budget {entry.text} is none of the study's ({', '.join(known)})")
    length = _entry(keys.get("length")) or _LENGTH
    for entry in (*found.lengths, length):
        if not entry.text.isdecimal() or int(entry.text) < 1:
            raise wrong(node.path, entry.line, f"length {entry.text!r}: expected tokens")
    return Part(found, methods, own, length)


def _distinct(path: Path, parts: list[Part]) -> None:
    names = [part.grid.name for part in parts]
    for part in parts:
        if names.count(part.grid.name) > 1:
            raise wrong(path, part.grid.tasks[0].line, f"two parts are called {part.grid.name!r}")


def _budgets(node: Node) -> list[Entry]:
    found = node.entries("budgets")
    for entry in found:
        if not 0 < _share(entry.text) < 1:
            raise wrong(node.path, entry.line, f"budget {entry.text!r}: expected a share between 0 and 1")
    if len({_share(entry.text) for entry in found}) < len(found):
        raise wrong(node.path, found[0].line, "two budgets are one number")
    return found


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _entry(node: Node | None) -> Entry | None:
    return None if node is None else Entry(node.text(), node.line)


def _number(node: Node | None, default: float) -> float:
    if node is None:
        return default
    value = _share(node.text())
    if not 0 < value < math.inf:
        raise wrong(node.path, node.line, f"expected a number above 0, not {node.text()!r}")
    return value
