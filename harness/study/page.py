"""A study's page: the board of its runs, with the budgets that were met and the samples behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from harness.errors import InputError
from harness.leaderboard.board import Board, Section
from harness.leaderboard.entries import Entry, read_entry
from harness.leaderboard.frame import paired
from harness.leaderboard.pages import Made, first_screen
from harness.leaderboard.pages import write as write_pages
from harness.report.table import Cell, Table, label, number
from harness.reproduce.published.judge import judge_all
from harness.study.matching import TOLERANCE, Matched
from harness.study.runs import StudyRun, recorded_runs
from harness.study.samples import detectable
from harness.study.study_file import StudyFile

_MATCHED_NOTE = (
    "Share of prompt tokens kept, mean over layers and KV heads. Asked: what the options come to before any prompt. "
    f"Recorded: mean over the records. Met: recorded within {TOLERANCE:.0%} of the budget; methods that keep all and "
    "attend to a part are matched in what a decode step attends to, by formula."
)
_SAMPLES_NOTE = (
    "Loss that is found: smallest mean difference over all tasks that so many paired samples find with 80 % power, the "
    "level shared out among the methods; standard deviation: of the paired differences as recorded, mean over methods."
)


def write(study: StudyFile, folder: Path, only: str = "*", output: Path | None = None) -> tuple[str, list[Path]]:
    """Draws what is recorded.

    Args:
        study: the file.
        folder: of its runs; models and data need not be here.
        only: patterns of runs, with commas between them.
        output: of the pages; `report` in the folder if None.

    Returns:
        The first screen for a terminal, and the files.

    Raises:
        InputError: nothing is recorded, a pattern fits no run, a run is corrupt, or a file cannot be written.
    """
    runs, lacking = recorded_runs(study, folder, only)
    entries = {run.folder: entry for run in runs for entry in _entry(run, folder)}
    lacking += [run.folder for run in runs if run.folder not in entries]
    if not entries:
        raise InputError(f"{folder} holds no records of {study.path}: expected {lacking[0]} and others in it")
    board = Board(list(entries.values()))
    known = [run for run in runs if run.folder in entries]
    made = Made(
        study.name,
        board,
        study.points,
        judge_all([folder / run.folder for run in known]),
        [matched_table(known, board), samples_table(board, study)],
        [*study.notes, *_finds(board, study), *_missing(known, lacking, entries)],
    )
    return first_screen(made), write_pages(made, output or folder / "report")


def _entry(run: StudyRun, folder: Path) -> Iterator[Entry]:
    found = read_entry(run.folder, folder / run.folder)
    if not found.run.records.empty:
        yield found


def _missing(runs: Sequence[StudyRun], lacking: Sequence[str], there: Mapping[str, Entry]) -> Iterator[str]:
    """What is not recorded yet: whole runs, and samples of those that are there."""
    if lacking:
        yield f"{len(lacking)} of {len(lacking) + len(runs)} runs have no records yet: {_few(lacking)}."
    counts = [(run, _samples(there[run.folder])) for run in runs]
    short = [f"{run.folder} ({n} of {run.spec.limit})" for run, n in counts if n < (run.spec.limit or 0)]
    if short:
        yield f"{len(short)} runs have fewer samples a task than the study asks for: {_few(short)}."


def _finds(board: Board, study: StudyFile) -> Iterator[str]:
    """How small a loss may be and still be found, beside the loss that the study is after."""
    found = [_power(section) for section in board.sections]
    if found:
        samples, least = sorted(one.samples for one in found), sorted(one.least for one in found)
        yield (
            f"{_span(samples)} samples a method find a loss of {_span(least)} points with 80 % power; {study.points:g} "
            "are wanted (table Samples). Who loses less than that stands in no sure order."
        )


def _span(ordered: Sequence[float]) -> str:
    """From the least to the most."""
    return " to ".join(dict.fromkeys(f"{end:.0f}" for end in (ordered[0], ordered[-1])))


def _samples(entry: Entry) -> int:
    """Of the task that has fewest; none where a task has none yet."""
    records, manifest = entry.run.records, entry.run.manifest
    return int(records.groupby("task")["sample"].nunique().reindex(manifest.tasks, fill_value=0).min())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def matched_table(runs: Sequence[StudyRun], board: Board) -> Table:
    """Method, budget, length -> options, share asked and share recorded."""
    rows = paired(board.entries)
    kept = rows.groupby(["entry", "label"])["kept"].mean()
    found: dict[tuple[Matched, float, int], list[float]] = {}
    for run in runs:
        for one in run.methods:
            share = float(kept.get((run.folder, one.label), math.nan))
            found.setdefault((one, run.budget, run.length), []).append(share)
    head = ["method", "budget", "length", "options", "asked", "recorded", "met"]
    lines = [_matched(*key, shares) for key, shares in found.items() if key[0].method != "full"]
    return Table("matched", "Matched budgets", _MATCHED_NOTE, head, lines, labels=4)


def _matched(one: Matched, budget: float, length: int, shares: Sequence[float]) -> list[Cell]:
    recorded = pd.Series(shares).mean()
    fixed = math.isnan(one.budget)
    return [
        label(one.method),
        label("fixed" if fixed else f"{budget:g}"),
        label(f"{length:,}"),
        label(one.label or f"none: {one.reason}"),
        number(one.share, f"{one.share:.3f}"),
        number(recorded, "-" if math.isnan(recorded) else f"{recorded:.3f}"),
        Cell(_met(one, budget, recorded)),
    ]


def _met(one: Matched, budget: float, recorded: float) -> str:
    if one.label is None or math.isnan(one.budget):
        return "-"
    if one.kind == "attended":
        return "by formula"
    if math.isnan(recorded):
        return "no record"
    apart = recorded / budget - 1
    return "yes" if abs(apart) <= TOLERANCE else f"no, {apart:+.1%}"


class _Power(NamedTuple):
    """What a section's samples find: a loss of so many points."""

    methods: int
    samples: int
    spread: float
    least: float


def _power(section: Section) -> _Power:
    differences = section.rows.groupby("entrant")["diff"]
    methods, samples, spread = differences.ngroups, int(differences.count().median()), float(differences.std().mean())
    return _Power(methods, samples, spread, 100 * detectable(samples, spread, methods))


def samples_table(board: Board, study: StudyFile) -> Table:
    """Section -> samples a method, and the loss that they find."""
    head = ["scores", "methods", "samples a method", "standard deviation", "loss that is found", "wanted"]
    rows = [_power_row(section, study.points) for section in board.sections]
    return Table("samples", "Samples", _SAMPLES_NOTE, head, rows, labels=1)


def _power_row(section: Section, points: float) -> list[Cell]:
    power = _power(section)
    return [
        label(section.title),
        number(power.methods, str(power.methods)),
        number(power.samples, str(power.samples)),
        number(power.spread, f"{power.spread:.2f}"),
        number(power.least, f"{power.least:.1f} points"),
        number(points, f"{points:g} points"),
    ]
