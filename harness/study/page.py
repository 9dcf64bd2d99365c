"""A study's page: the board of its runs, with the budgets that were met and the samples behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from harness.errors import InputError
from harness.leaderboard.board import Board
from harness.leaderboard.entries import Entry, read_entry
from harness.leaderboard.frame import paired
from harness.leaderboard.pages import Made, first_screen
from harness.leaderboard.pages import write as write_pages
from harness.report.table import Cell, Table, label, number
from harness.reproduce.published.judge import judge_all
from harness.storage.store import MANIFEST
from harness.study.matching import TOLERANCE, Matched
from harness.study.runs import StudyRun
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


def write(study: StudyFile, runs: Sequence[StudyRun], folder: Path) -> tuple[str, list[Path]]:
    """Draws what is recorded, into `report` in the study's folder.

    Returns:
        The first screen for a terminal, and the files.

    Raises:
        InputError: nothing is recorded, a run is corrupt, or a file cannot be written.
    """
    there = [run for run in runs if (folder / run.folder / MANIFEST).is_file()]
    entries = [entry for run in there for entry in _entry(run, folder)]
    if not entries:
        raise InputError(f"{folder} holds no records of {study.path}: expected {runs[0].folder} and others in it")
    board = Board(entries)
    recorded = {entry.name: entry for entry in entries}
    known = [run for run in there if run.folder in recorded]
    made = Made(
        study.name,
        board,
        study.points,
        judge_all([folder / run.folder for run in known]),
        [matched_table(known, board), samples_table(board, study)],
        list(_missing(runs, recorded)),
    )
    return first_screen(made), write_pages(made, folder / "report")


def _entry(run: StudyRun, folder: Path) -> Iterator[Entry]:
    found = read_entry(run.folder, folder / run.folder)
    if not found.run.records.empty:
        yield found


def _missing(runs: Sequence[StudyRun], there: dict[str, Entry]) -> Iterator[str]:
    """What is not recorded yet: whole runs, and samples of those that are there."""
    none = [run.folder for run in runs if run.folder not in there]
    if none:
        yield f"{len(none)} of {len(runs)} runs have no records yet: {_few(none)}."
    counts = [(run, _samples(there[run.folder])) for run in runs if run.folder in there]
    short = [f"{run.folder} ({n} of {run.spec.limit})" for run, n in counts if n < (run.spec.limit or 0)]
    if short:
        yield f"{len(short)} runs have fewer samples a task than the study asks for: {_few(short)}."


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


def samples_table(board: Board, study: StudyFile) -> Table:
    """Section -> samples a method, and the loss that they find."""
    head = ["scores", "methods", "samples a method", "standard deviation", "loss that is found", "wanted"]
    rows = []
    for section in board.sections:
        counts = section.rows.groupby("entrant")["diff"].count()
        spread = float(section.rows.groupby("entrant")["diff"].std().mean())
        samples = int(counts.median())
        least = 100 * detectable(samples, spread, len(counts))
        rows.append(
            [
                label(section.title),
                number(len(counts), str(len(counts))),
                number(samples, str(samples)),
                number(spread, f"{spread:.2f}"),
                number(least, f"{least:.1f} points"),
                number(study.points, f"{study.points:g} points"),
            ]
        )
    return Table("samples", "Samples", _SAMPLES_NOTE, head, rows, labels=1)
