"""What a study would ask, with which options, how small a loss its samples find, and how long it may take."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.leaderboard.board import at_budget
from harness.report.formats import duration
from harness.report.table import Cell, Table, label, number, to_markdown
from harness.runner.estimate import TAKES, Ahead, CellEstimate, Counts, estimate, seen_near
from harness.runner.spec import RunSpec
from harness.statistics.paired import REFERENCE
from harness.storage.store import MANIFEST, Spent, answered, load_manifest
from harness.study.changed import changed
from harness.study.matching import TOLERANCE, Matched
from harness.study.runs import StudyRun
from harness.study.samples import detectable, samples_for
from harness.study.study_file import StudyFile

_NOTE = (
    "A run is one part at one budget, length and protocol. Left: at the recorded rate, loading included, of the part "
    "at that length, whatever budget and protocol; else by requests like these beside the folder, or a floor from "
    "FLOPs and ceilings, to which loading comes on top; `?` where nothing says."
)
_MATCHED_NOTE = (
    f"Options that meet a budget within {TOLERANCE:.0%}, by what a method says before it sees a prompt: prompt tokens "
    "kept, mean over layers and KV heads; `attended`: all are kept, and a decode step attends to as many."
)
_SCORELESS = "speed"


@dataclass(frozen=True)
class Found(Ahead):
    """A run, and what is known of it before it goes on.

    Attributes:
        run: which.
    """

    run: StudyRun


def outlook(study: StudyFile, runs: Sequence[StudyRun], folder: Path, samples: int | None = None) -> str:
    """Runs, sums and matched options as Markdown.

    Args:
        study: the file.
        runs: those that are to be run.
        folder: of its records; similar runs are looked for beside it.
        samples: of each task at most, if fewer than the study's own.
    """
    counts: Counts = {}
    seen = seen_near(folder.parent)
    found = [_found(run, estimate(_limited(run, samples), seen, counts), folder) for run in runs]
    head = ["run", "tasks", "methods", "requests", "without a record", "left", "from"]
    table = Table("outlook", study.name, _NOTE, head, [_row(one) for one in found], labels=1)
    matched = Table("matched", "Matched budgets", _MATCHED_NOTE, MATCHED_HEAD, matched_rows(runs), labels=4)
    return "\n".join([to_markdown(table), _sums(found), *_finds(study, found), "", to_markdown(matched)])


def _found(run: StudyRun, cells: Sequence[CellEstimate], folder: Path) -> Found:
    return Found(cells, _there(run, folder / run.folder), _rate(run, folder), run)


def _rate(run: StudyRun, folder: Path) -> Spent:
    """What runs of the part at that length have taken, at all budgets and under both protocols."""
    alike = re.sub(r"(kept|question)=[^-]+", r"\1=*", run.folder)
    found = [load_manifest(path.parent).spent for path in sorted(folder.glob(f"{alike}/{MANIFEST}"))]
    return Spent(seconds=sum(one.seconds for one in found), requests=sum(one.requests for one in found))


def _there(run: StudyRun, folder: Path) -> Mapping[tuple[str, str], int]:
    """Records by method and task; those that are to be asked again do not count."""
    if not (folder / MANIFEST).is_file():
        return {}
    stale = {*changed(run.spec, folder).cells.values()} if run.spec.redo else set[str]()
    return Counter((record.method, record.task) for record in answered(folder) if record.cell not in stale)


def _sums(found: Sequence[Found]) -> str:
    """How much is left, and how long that takes, by what is known of it."""
    left = sum(one.left for one in found)
    parts = []
    for source, words in TAKES.items():
        if own := [one for one in found if one.source == source and one.left]:
            parts.append(f"{words.format(duration(sum(one.seconds or 0.0 for one in own)))} ({len(own)} runs)")
    unknown = sum(one.source == "unknown" for one in found)
    parts += [f"{unknown} runs cannot be estimated"] if unknown else []
    asked = sum(one.requests for one in found)
    return f"{len(found)} runs, {asked} requests, {left} left: {'; '.join(parts) or 'nothing to do'}."


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


def _limited(run: StudyRun, samples: int | None) -> RunSpec:
    most = min((limit for limit in (run.spec.limit, samples) if limit), default=None)
    return run.spec.model_copy(update={"limit": most})


def _row(one: Found) -> list[Cell]:
    tasks, methods = ({getattr(cell, name) for cell in one.cells} for name in ("task", "method"))
    seconds = one.seconds
    return [
        label(one.run.folder),
        number(len(tasks), str(len(tasks))),
        number(len(methods), str(len(methods))),
        number(one.requests, str(one.requests)),
        number(one.left, str(one.left)),
        number(seconds, "?" if seconds is None else duration(seconds) if one.left else "none"),
        Cell(one.source),
    ]


def _finds(study: StudyFile, found: Sequence[Found]) -> list[str]:
    """Which loss the samples find at each budget, under each protocol and over all."""
    lines = list[str]()
    scored = [one for one in found if not one.cells[0].task.startswith(_SCORELESS)]
    for budget in dict.fromkeys(one.run.budget for one in scored):
        own = [one for one in scored if one.run.budget == budget]
        questions = dict.fromkeys(one.run.spec.question for one in own)
        parts = {f"question {asked}": [one for one in own if one.run.spec.question == asked] for asked in questions}
        parts |= {"over all": own} if len(parts) > 1 else {}
        lines += [f"{at_budget(budget).capitalize()}, {name}: {_finding(study, part)}" for name, part in parts.items()]
    return lines


def _finding(study: StudyFile, found: Sequence[Found]) -> str:
    methods = max(len({cell.method for cell in one.cells}) for one in found) - 1
    samples = sum(cell.samples or 0 for one in found for cell in one.cells if cell.method == REFERENCE)
    least = 100 * detectable(samples, study.spread, methods)
    wanted = samples_for(study.points / 100, study.spread, methods)
    return (
        f"{samples} samples a method find a loss of {least:.1f} points ({methods} methods, 80 % power, standard "
        f"deviation {study.spread:g}); {study.points:g} points take {wanted}."
    )
