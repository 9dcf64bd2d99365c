"""From a study to runs: one a part, budget, length and protocol, each with all methods that can meet the budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from harness.engine.shape import ModelShape
from harness.errors import InputError, MissingPackage
from harness.models.load import describe
from harness.predict.work import known_shape
from harness.runner.plan import plan
from harness.runner.spec import RunSpec, WrongOption, folder_name
from harness.storage.store import MANIFEST, load_manifest
from harness.study.matching import Matched, match
from harness.study.study_file import MethodEntry, Part, StudyFile
from harness.sweep.cells import SweepRun, multiply
from harness.sweep.grid_file import MethodGrid
from harness.yaml_file import Entry


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        part: its name.
        budget: share of the prompt that is kept; 0 where none is matched.
        length: prompt tokens that options were found for.
        methods: at that budget, those that cannot meet it too.
        run: what it asks; its folder is relative to the study's.
    """

    part: str
    budget: float
    length: int
    methods: list[Matched]
    run: SweepRun

    @property
    def folder(self) -> str:
        """Of its records, within the study's."""
        return self.run.folder

    @property
    def spec(self) -> RunSpec:
        """What it asks."""
        return self.run.spec


def study_runs(study: StudyFile, data_dir: Path | None = None, only: str = "*") -> list[StudyRun]:
    """The runs of a study, budget by budget, its parts in order; only their models' shapes need be here.

    Args:
        study: the file.
        data_dir: folder of data sets.
        only: patterns of folders, with commas between them.

    Raises:
        InputError: a method, task or option that there is not, with the line; a pattern that fits no run.
    """
    return [_run(study, point, _shape(study, point.part), data_dir) for point in _points(study, only)]


def recorded_runs(study: StudyFile, folder: Path, only: str = "*") -> tuple[list[StudyRun], list[str]]:
    """The runs that a folder has, and the names of those that it lacks; neither models nor data need be here.

    Args:
        study: the file.
        folder: of the study's runs.
        only: see `study_runs`.

    Raises:
        InputError: as `study_runs`; a manifest that is corrupt, or does not say its model's shape.
    """
    points = _points(study, only)
    there = [point for point in points if (folder / point.folder / MANIFEST).is_file()]
    runs = [_run(study, point, _recorded_shape(folder / point.folder)) for point in there]
    return runs, [point.folder for point in points if point not in there]


def check_runs(runs: list[StudyRun]) -> tuple[list[StudyRun], list[str]]:
    """The runs that can be run here, and a line for each reason why others cannot, such as data that is not here.

    Raises:
        InputError: none can, or options of a part do not go together.
        MissingPackage: packages that some of them need, all in one line, with the parts that need none of them.
    """
    good: list[StudyRun] = []
    reasons: dict[str, list[str]] = {}
    lacking: dict[str, dict[str, None]] = {}
    for run in runs:
        try:
            plan(run.spec)
            good.append(run)
        except MissingPackage as error:
            for line in error.args:
                lacking.setdefault(line, {})[run.part] = None
        except WrongOption as error:
            raise InputError(f"part {run.part!r}: {error}") from None
        except InputError as error:
            reasons.setdefault(str(error), []).append(run.folder)
    if lacking:
        raise _lacking(lacking, good)
    lines = [f"left out: {', '.join(folders)}: {reason}" for reason, folders in reasons.items()]
    if not good:
        raise InputError(lines[0])
    return good, lines


def _lacking(lacking: dict[str, dict[str, None]], good: list[StudyRun]) -> MissingPackage:
    """The error for packages that are missing: which parts need them, and how to go on without those."""
    bad = dict.fromkeys(part for parts in lacking.values() for part in parts)
    rest = dict.fromkeys(f"{run.part}/*" for run in good if run.part not in bad)
    without = f"--only '{','.join(rest)}' does without" if rest else "no part does without"
    needed = "; ".join(f"{', '.join(parts)}: {line}" for line, parts in lacking.items())
    return MissingPackage(f"nothing was run, packages are missing: {needed}; {without}")


class _Point(NamedTuple):
    """Where a run is in the study."""

    part: Part
    budget: Entry | None
    length: Entry | None
    question: Entry

    @property
    def folder(self) -> str:
        """Of its records, within the study's."""
        point = {"kept": self.budget, "length": self.length, "question": self.question}
        name = "-".join(f"{key}={entry.text}" for key, entry in point.items() if entry is not None)
        return f"{folder_name(self.part.grid.name)}/{name}"


def _points(study: StudyFile, only: str) -> list[_Point]:
    """Those that patterns choose, the most important first."""
    points = [point for part in study.parts for point in _points_of(part)]
    points.sort(key=lambda point: study.budgets.index(point.budget.text) if point.budget else 0)
    patterns = [pattern.strip() for pattern in only.split(",")]
    for pattern in patterns:
        if not any(fnmatch(point.folder, pattern) for point in points):
            raise InputError(f"--only {pattern!r} fits none of the runs: {points[0].folder}, ... {points[-1].folder}")
    return [point for point in points if any(fnmatch(point.folder, pattern) for pattern in patterns)]


def _points_of(part: Part) -> Iterator[_Point]:
    lengths: list[Entry | None] = [*part.grid.lengths] or [None]
    questions = part.grid.runs.get("question", [Entry("prompt", 1)])
    budgets: list[Entry | None] = [*part.budgets] or [None]
    for budget, length, question in product(budgets, lengths, questions):
        yield _Point(part, budget, length, question)


def _run(study: StudyFile, point: _Point, shape: ModelShape, data_dir: Path | None = None) -> StudyRun:
    part, budget, length, question = point
    tokens = int((length or part.length).text)
    methods = [found for entry in part.methods for found in _matched(study, entry, budget, shape, tokens)]
    labels = [MethodGrid(one.label, {}, question.line) for one in methods if one.label is not None]
    axes = part.grid.runs | {"question": [question]}
    grid = replace(part.grid, methods=labels, lengths=[] if length is None else [length], runs=axes)
    (run,) = multiply(grid, data_dir).runs
    share = float(budget.text) if budget else 0.0
    return StudyRun(part.grid.name, share, tokens, methods, replace(run, folder=point.folder))


def _matched(
    study: StudyFile, entry: MethodEntry, budget: Entry | None, shape: ModelShape, length: int
) -> Iterator[Matched]:
    chosen = budget.text if budget else study.budgets[0]
    if (template := entry.templates.get(chosen)) is None:
        return
    try:
        yield match(template.text, float(chosen), shape, length)
    except InputError as error:
        raise study.wrong(template.line, str(error)) from None


def _shape(study: StudyFile, part: Part) -> ModelShape:
    """Of the part's model; options are found for one shape."""
    models = part.grid.runs.get("model", [Entry("smollm2", 1)])
    for key, values in part.grid.runs.items():
        if key != "question" and len(values) > 1:
            raise study.wrong(values[1].line, f"a part has one {key}; make another part")
    try:
        return _described(models[0].text)
    except InputError as error:
        raise study.wrong(models[0].line, str(error)) from None


def _recorded_shape(folder: Path) -> ModelShape:
    if (shape := known_shape(load_manifest(folder))) is None:
        raise InputError(f"{folder / MANIFEST} does not say its model's shape, for which options were found")
    return shape


_described = lru_cache(maxsize=8)(describe)
