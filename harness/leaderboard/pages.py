"""The pages of a board: the first screen, a page a method, a page a run with every sample; static, no server."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.leaderboard.board import Board, Section
from harness.leaderboard.needs import NEEDS, answers
from harness.leaderboard.plots import front
from harness.leaderboard.tables import (
    cells_table,
    losses_table,
    needs_table,
    page_of,
    run_page,
    times_table,
)
from harness.report.build import build
from harness.report.figures import save
from harness.report.html import environment, picture
from harness.report.table import Table, to_markdown
from harness.reproduce.published.judge import Judged
from harness.reproduce.published.page import table as claims_table
from harness.runner.catalog import METHODS

_FRONTS = (("ttft", "TTFT"), ("kv", "KV bytes"), ("tpot", "time a token"))


@dataclass(frozen=True)
class Made:
    """What is put onto pages.

    Attributes:
        title: heading.
        board: the runs.
        points: loss that is still acceptable.
        claims: published ones, judged.
        extra: more tables for the first page.
        notes: more that speaks against the numbers.
    """

    title: str
    board: Board
    points: float
    claims: Sequence[Judged] = ()
    extra: Sequence[Table] = ()
    notes: Sequence[str] = field(default=())


def write(made: Made, folder: Path) -> list[Path]:
    """Writes all pages.

    Returns:
        The first page, and the same as Markdown.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        (folder / "methods").mkdir(parents=True, exist_ok=True)
        for entry in made.board.entries:
            build(entry.run, folder / "runs" / entry.name)
        for method in _methods(made.board):
            (folder / page_of(method)).write_text(_method_page(made, method), encoding="utf-8")
        page, plain = folder / "index.html", folder / "index.md"
        page.write_text(_first_page(made, folder), encoding="utf-8")
        plain.write_text(markdown(made), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the board: {error.strerror}") from None
    return [page, plain]


def markdown(made: Made) -> str:
    """The first page's tables, for where HTML is not shown."""
    notes = "\n".join(f"- {text}" for text in _notes(made))
    tables = [_needs(made), *_losses(made.board), *_times(made.board), *made.extra]
    return "\n".join([f"# {made.title}\n", notes, "", *(to_markdown(table) for table in tables if table.rows)])


def first_screen(made: Made) -> str:
    """What a terminal shows: which method for what, and what was not put together."""
    return "\n".join([to_markdown(_needs(made)), *_notes(made)])


def _first_page(made: Made, folder: Path) -> str:
    tables = [*_losses(made.board), *_times(made.board), *made.extra, *_claims(made.claims)]
    return _render(
        made.title,
        _facts(made.board),
        first=_needs(made),
        notes=_notes(made),
        images=list(_pictures(made.board, folder)),
        tables=tables,
        links=[
            ("methods", [(method, page_of(method)) for method in _methods(made.board)]),
            ("runs", [(entry.name, run_page(entry.name)) for entry in made.board.entries]),
        ],
    )


def _method_page(made: Made, method: str) -> str:
    board, own = made.board, [one for one in made.claims if one.published.method == method]
    times = [times_table(clock, f"times-{index}", method) for index, clock in enumerate(board.clocks)]
    losses = [_of_method(section, index, method) for index, section in enumerate(board.sections)]
    return _render(
        method,
        [("method", method), *([("what", METHODS.get(method).summary)] if method in METHODS.names() else [])],
        up="../",
        paragraphs=_about(method),
        tables=[*losses, *_claims(own), cells_table(board, method), *times],
    )


def _of_method(section: Section, index: int, method: str) -> Table:
    whole = losses_table(section, f"losses-{index}", "../")
    names = {one.entrant for one in section.standings if one.method == method}
    rows = [row for row in whole.rows if row[0].text in names]
    return Table(whole.name, whole.title, whole.note, whole.head, rows, whole.labels)


def _about(method: str) -> list[str]:
    """The paragraphs of a method's own description, as far as it is here."""
    if method not in METHODS.names():
        return []
    text = cleandoc(sys.modules[METHODS.get(method).__module__].__doc__ or "")
    return [" ".join(part.split()) for part in text.split("\n\n") if "\n- " not in part]


def _render(title: str, facts: Sequence[tuple[str, str]], **parts: Any) -> str:
    empty: dict[str, Any] = {"up": "", "paragraphs": [], "first": None, "notes": [], "images": [], "links": []}
    shown = empty | parts
    first = [shown["first"]] if shown["first"] else []
    places = [(table.name, table.title) for table in [*first, *shown["tables"]] if table.rows]
    template = environment("harness.leaderboard").get_template("board.html.j2")
    return template.render(title=title, facts=facts, places=places, **shown)


def _facts(board: Board) -> list[tuple[str, str]]:
    groups = {"scores": board.scores, "times": board.times}
    records = sum(len(entry.run.records) for entry in board.entries)
    said = [("runs", str(len(board.entries))), ("records", f"{records:,}")]
    return said + [(name, "; ".join(group.title for group in found)) for name, found in groups.items() if found]


def _needs(made: Made) -> Table:
    return needs_table(answers(made.board, made.points), made.points)


def _notes(made: Made) -> list[str]:
    return [*made.notes, *made.board.notes()]


def _losses(board: Board) -> list[Table]:
    return [losses_table(section, f"losses-{index}") for index, section in enumerate(board.sections)]


def _times(board: Board) -> list[Table]:
    return [times_table(clock, f"times-{index}") for index, clock in enumerate(board.clocks)]


def _claims(claims: Sequence[Judged]) -> list[Table]:
    return [claims_table(claims)] if claims else []


def _methods(board: Board) -> list[str]:
    labels: Iterable[str] = (label for entry in board.entries for label in entry.run.methods)
    return list(dict.fromkeys(label.partition(":")[0] for label in labels))


def _pictures(board: Board, folder: Path) -> Iterable[dict[str, str]]:
    """A front for each protocol and each thing that is won."""
    if (clock := board.clock) is None:
        return
    protocols = dict.fromkeys(need.protocol for need in NEEDS)
    for protocol in protocols:
        own = [section for section in board.sections if section.group.conditions.protocol == protocol]
        own = [section for section in own if section.group is own[0].group]
        for measure, words in _FRONTS:
            figure = front(own, clock, measure, words)
            if figure is not None:
                asked = "after the context" if protocol == "after" else "in the prompt"
                caption = f"Score against {words}, question {asked}; dashed: nobody is better in both."
                _, svg = save(figure, folder, f"front-{measure}-{protocol}")
                yield picture("front", svg.read_bytes()) | {"caption": caption}
