"""The pages of a board: the first screen, a page a method, a page a run with every sample; static, no server."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.leaderboard.board import PROTOCOLS, Board, Section
from harness.leaderboard.entries import asked
from harness.leaderboard.plots import front
from harness.leaderboard.tables import (
    cells_table,
    kinds_table,
    losses_table,
    needs_table,
    page_of,
    runs_table,
    suites_table,
    times_table,
)
from harness.report import formats
from harness.report.build import build
from harness.report.figures import save
from harness.report.html import environment, picture
from harness.report.table import Table, to_markdown
from harness.reproduce.published.judge import Judged
from harness.reproduce.published.page import table as claims_table
from harness.runner.catalog import METHODS

_FRONTS = (("ttft", "TTFT"), ("kv", "KV bytes"), ("tpot", "time a token"))
_KINDS = {
    "losses": "Losses and ranks",
    "kinds": "Losses by kind of task",
    "suites": "Losses by suite",
    "times": "Times and memory",
}


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
        The first page, and the same as Markdown; `needs.md` beside them is the first screen in short.

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
        plain.write_text(markdown(made, folder), encoding="utf-8")
        (folder / "needs.md").write_text(_short(made), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the board: {error.strerror}") from None
    return [page, plain]


def markdown(made: Made, folder: Path) -> str:
    """The first page's tables, for where HTML is not shown."""
    missing, apart = ([*(f"- {text}" for text in texts), ""] if texts else [] for texts in _notes(made))
    first, *others = (to_markdown(table) for table in [_needs(made), *_tables(made, folder)] if table.rows)
    bounds = ["## What speaks against it", "", *missing] if missing else []
    return "\n".join([f"# {made.title}", "", first, *bounds, *others, *apart]).rstrip("\n") + "\n"


def _short(made: Made) -> str:
    """The first screen without its heading, one entrant where it has several alike: for pages of others."""
    return to_markdown(needs_table(made.board, made.points, shown=1)).partition("\n\n")[2]


def first_screen(made: Made) -> str:
    """What a terminal shows: which method for what, what is missing, and what was not put together."""
    return "\n".join([to_markdown(_needs(made)), *(text for texts in _notes(made) for text in texts)])


def _first_page(made: Made, folder: Path) -> str:
    missing, apart = _notes(made)
    return _render(
        made.title,
        _facts(made.board),
        first=_needs(made),
        notes=missing,
        apart=apart,
        images=list(_pictures(made.board, folder)),
        tables=[*_tables(made, folder), *_claims(made.claims)],
        methods=[(method, page_of(method)) for method in _methods(made.board)],
    )


def _tables(made: Made, folder: Path) -> list[Table]:
    return [*_losses(made.board), *_times(made.board), *made.extra, runs_table(made.board, folder)]


def _method_page(made: Made, method: str) -> str:
    board, own = made.board, [one for one in made.claims if one.published.method == method]
    what = [("what", METHODS.get(method).summary)] if method in METHODS.names() else []
    times = [times_table(clock, f"times-{index}", method, "../") for index, clock in enumerate(board.clocks)]
    losses = [
        _of_method(section, draw(section, f"{name}-{index}", "../"), method)
        for index, section in enumerate(board.sections)
        for name, draw in (("losses", losses_table), ("kinds", kinds_table))
    ]
    return _render(
        method,
        [*what, *_sayings(board, method)],
        up="../",
        paragraphs=_about(method),
        tables=[*losses, *_claims(own), cells_table(board, method), *times],
    )


def _sayings(board: Board, method: str) -> Iterable[tuple[str, str]]:
    """What of the context it kept, and the kind of task that it shows the greatest loss in."""
    own = [(section, one) for section in board.sections for one in section.standings if one.method == method]
    kept = sorted(one.kept for _, one in own if math.isfinite(one.kept))
    if kept:
        yield "kept", " to ".join(dict.fromkeys(formats.percent(share) for share in (kept[0], kept[-1])))
    fails = [
        (found.high, f"{kind}: {formats.points(found.value, found.low, found.high)} points, {section.title}")
        for section, one in own
        for kind, found in one.kinds.items()
        if found.high < 0
    ]
    if own:
        yield "fails most", min(fails)[1] if fails else "no loss is shown in any kind of task"


def _of_method(section: Section, whole: Table, method: str) -> Table:
    names = {one.entrant for one in section.standings if one.method == method}
    rows = [row for row in whole.rows if row[0].text in names]
    told = [index for index in range(len(whole.head)) if any(row[index].text != formats.NOTHING for row in rows)]
    head, rows = [whole.head[index] for index in told], [[row[index] for index in told] for row in rows]
    return Table(whole.name, whole.title, whole.note, head, rows, whole.labels)


def _about(method: str) -> list[str]:
    """The paragraphs of a method's own description, as far as it is here."""
    if method not in METHODS.names():
        return []
    text = cleandoc(sys.modules[METHODS.get(method).__module__].__doc__ or "")
    return [" ".join(part.split()) for part in text.split("\n\n") if "\n- " not in part]


def _render(title: str, facts: Sequence[tuple[str, str]], **parts: Any) -> str:
    empty: dict[str, Any] = {
        "up": "", "paragraphs": [], "first": None, "notes": [], "apart": [], "images": [], "methods": [],
    }  # fmt: skip
    shown = empty | parts
    tables = [table for table in (shown["first"], *shown["tables"]) if table is not None and table.rows]
    template = environment("harness.leaderboard").get_template("board.html.j2")
    return template.render(title=title, facts=facts, places=_places(tables), **shown)


def _places(tables: Sequence[Table]) -> list[tuple[str, str]]:
    """Where the page leads: to the first table of each kind."""
    kinds: dict[str, tuple[str, str]] = {}
    for table in tables:
        kind = table.name.partition("-")[0]
        kinds.setdefault(kind, (table.name, _KINDS.get(kind, table.title)))
    return list(kinds.values())


def _facts(board: Board) -> list[tuple[str, str]]:
    records = sum(len(entry.run.records) for entry in board.entries)
    return [("runs", str(len(board.entries))), ("records", f"{records:,}"), ("methods", str(len(_methods(board))))]


def _needs(made: Made) -> Table:
    return needs_table(made.board, made.points)


def _notes(made: Made) -> tuple[list[str], list[str]]:
    """What is missing, and what was not put together."""
    return list(made.notes), list(made.board.notes())


def _losses(board: Board) -> Iterator[Table]:
    for index, section in enumerate(board.sections):
        yield losses_table(section, f"losses-{index}")
        if len(section.kinds) > 1:
            yield kinds_table(section, f"kinds-{index}")
        if len(section.suites) > 1:
            yield suites_table(section, f"suites-{index}")


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
    where = f"longest prompts, {clock.group.conditions.model} on {clock.group.conditions.place}"
    for protocol in PROTOCOLS:
        for measure, words in _FRONTS:
            figure = front(board.judged(protocol), clock, measure, words)
            if figure is not None:
                caption = f"{words} ({where}) against loss, {asked(protocol)}. Bars: 95 %. {_LEGEND}"
                _, svg = save(figure, folder, f"front-{measure}-{protocol}")
                yield picture("front", svg.read_bytes()) | {"caption": caption}


_LEGEND = (
    "Hollow: too few samples for an interval. In brackets: controls. Dashed: nobody with intervals is better in both."
)
