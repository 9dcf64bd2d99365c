"""What a study would ask, with which options, how small a loss its samples find, and how long it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.leaderboard.board import at_budget
from harness.report.table import Cell, Table, label, number, to_markdown
from harness.statistics.paired import REFERENCE
from harness.study.matching import TOLERANCE, Matched
from harness.study.runs import StudyRun
from harness.study.samples import detectable, samples_for
from harness.study.study_file import StudyFile
from harness.sweep.cells import SweepRun
from harness.sweep.estimate import CellEstimate, Counts, estimate
from harness.sweep.outlook import duration

_NOTE = (
    "A run is one part at one budget, length and protocol. Time: from recorded requests like these where there are any "
    "beside the folder, else a floor from FLOPs and ceilings; `?` where neither says. Loading and drawing come on top."
)
_MATCHED_NOTE = (
    f"Options that meet a budget within {TOLERANCE:.0%}, by what a method says before it sees a prompt: prompt tokens "
    "kept, mean over layers and KV heads; `attended`: all are kept, and a decode step attends to as many."
)
_SCORELESS = "speed"

Found = tuple[StudyRun, Sequence[CellEstimate]]
"""A run and what its cells are estimated to take."""


def outlook(study: StudyFile, runs: Sequence[StudyRun], folder: Path, samples: int | None = None) -> str:
    """Runs, sums and matched options as Markdown.

    Args:
        study: the file.
        runs: those that are to be run.
        folder: of its records; similar runs are looked for beside it.
        samples: of each task at most, if fewer than the study's own.
    """
    counts: Counts = {}
    found = [(run, estimate(_limited(run, samples), folder.parent, counts)) for run in runs]
    head = ["run", "tasks", "methods", "requests", "time"]
    table = Table("outlook", study.name, _NOTE, head, [_row(run, cells) for run, cells in found], labels=1)
    matched = Table("matched", "Matched budgets", _MATCHED_NOTE, MATCHED_HEAD, matched_rows(runs), labels=4)
    return "\n".join([to_markdown(table), *_finds(study, found), "", to_markdown(matched)])


MATCHED_HEAD = ["method", "budget", "length", "options", "share", "counted in"]


def matched_rows(runs: Sequence[StudyRun]) -> list[list[Cell]]:
    """One row a method, budget and length; runs of one shape and length have the same options."""
    found = {(one, run.budget, run.length): None for run in runs for one in run.methods if one.method != REFERENCE}
    order = list(dict.fromkeys(one.method for one, _, _ in found))
    rows = sorted(found, key=lambda row: (order.index(row[0].method), -row[1], row[2]))
    return [_matched_row(one, budget, length) for one, budget, length in rows]


def _matched_row(one: Matched, budget: float, length: int) -> list[Cell]:
    fixed = math.isnan(one.budget)
    return [
        label(one.method),
        label("fixed" if fixed else f"{budget:g}"),
        label(length),
        label(one.label or f"none: {one.reason}"),
        number(one.share, f"{one.share:.4f}"),
        label(one.kind),
    ]


def _limited(run: StudyRun, samples: int | None) -> SweepRun:
    most = min((limit for limit in (run.spec.limit, samples) if limit), default=None)
    return replace(run.run, spec=run.spec.model_copy(update={"limit": most}))


def _row(run: StudyRun, cells: Sequence[CellEstimate]) -> list[Cell]:
    requests, seconds = _requests(cells), _seconds(cells)
    tasks, methods = ({getattr(cell, name) for cell in cells} for name in ("task", "method"))
    return [
        label(run.folder),
        number(len(tasks), str(len(tasks))),
        number(len(methods), str(len(methods))),
        number(requests, str(requests)),
        number(seconds, "?" if seconds is None else duration(seconds)),
    ]


def _requests(cells: Sequence[CellEstimate]) -> int:
    return sum(cell.samples or 0 for cell in cells)


def _seconds(cells: Sequence[CellEstimate]) -> float | None:
    known = [cell.seconds for cell in cells if cell.seconds is not None]
    return sum(known) if len(known) == len(cells) else None


def _finds(study: StudyFile, found: Sequence[Found]) -> list[str]:
    """How much is asked, and which loss that finds at each budget, under each protocol and over all."""
    lines = [f"{len(found)} runs, {sum(_requests(cells) for _, cells in found)} requests."]
    scored = [(run, cells) for run, cells in found if not cells[0].task.startswith(_SCORELESS)]
    for budget in dict.fromkeys(run.budget for run, _ in scored):
        own = [(run, cells) for run, cells in scored if run.budget == budget]
        questions = dict.fromkeys(run.spec.question for run, _ in own)
        parts = {
            f"question {one}": [(run, cells) for run, cells in own if run.spec.question == one] for one in questions
        }
        parts |= {"over all": own} if len(parts) > 1 else {}
        lines += [f"{at_budget(budget).capitalize()}, {name}: {_finding(study, part)}" for name, part in parts.items()]
    return lines


def _finding(study: StudyFile, found: Sequence[Found]) -> str:
    methods = max(len({cell.method for cell in cells}) for _, cells in found) - 1
    samples = sum(cell.samples or 0 for _, cells in found for cell in cells if cell.method == REFERENCE)
    least = 100 * detectable(samples, study.spread, methods)
    wanted = samples_for(study.points / 100, study.spread, methods)
    return (
        f"{samples} samples a method find a loss of {least:.1f} points ({methods} methods, 80 % power, standard "
        f"deviation {study.spread:g}); {study.points:g} points take {wanted}."
    )
