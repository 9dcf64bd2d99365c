"""The tables of a board's pages."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from harness.leaderboard.board import PROTOCOLS, Board, Clock, Section, Standing, at_budget
from harness.leaderboard.effects import Found, loss
from harness.leaderboard.entries import Entry, asked, timed
from harness.leaderboard.needs import NEEDS, SHOWN, Answer, Need, answers, missing, so_far
from harness.report import formats
from harness.report.table import Cell, Table, label, number
from harness.statistics.estimators import FEWEST
from harness.storage.samples import PACKED, SAMPLES

_FEW = f"No interval: fewer than {FEWEST} contexts."
_LOSS = (
    "Against full: score less full attention's on the same samples, in points; tasks and lengths count the same; 95 % "
    "intervals. Rank: by mean score over the samples that all have answered, with the 95 % interval of the place "
    "(bootstrap). Kept: share of the context's tokens over layers and KV heads, as recorded; of what keeps all, and "
    "meets a budget, a decode step reads that share. Options: of the first run; other lengths differ in numbers. "
    f"{_FEW}"
)
_TIMES = (
    "Full attention's time, or bytes of keys, values and the method's own stores, over the method's: above 1 is "
    "better. Kept: as recorded; a method that takes tokens back when it needs them holds more bytes. A length links to "
    "its run's page."
)
_RUNS = "A run links to its page with every sample, its records to their file: all numbers here come from these."
_GAINS = {
    "TTFT": "first token {} sooner",
    "time a token": "each further token {} sooner",
    "KV bytes": "{} less for keys and values",
}
_PRICES = {
    "TTFT": "first token {} later",
    "time a token": "each further token {} later",
    "KV bytes": "{} more for keys and values",
}
_CELLS = "One row a task. A task links to its run's page, which has every sample."


def needs_table(board: Board, points: float, shown: int = SHOWN) -> Table:
    """The first screen: which for what; so many of those whose loss is as well known."""
    who = "who wins most" if shown == 1 else f"the {shown} who win most"
    note = (
        f"For each need {who} among those whose loss is shown to stay within {points:g} points; then, if they win "
        f"more, of whom nobody can tell yet, and who likely loses more. Price: what gets worse for it. {_places(board)}"
    )
    head = ["you want", "method", "budget", "you win", "score against full", "how sure", "price"]
    found = answers(board, points, shown)
    rows = [row for need in NEEDS for row in _needs(need, [one for one in found if one.need is need], board, points)]
    return Table("needs", "Which method for what", note, head, rows, labels=2)


def _places(board: Board) -> str:
    """What is lost and won, and on which model."""
    groups = [section.group for protocol in PROTOCOLS for section in board.judged(protocol)]
    lost = (
        f"Scores, in points with 95 % intervals: {groups[0].conditions.model}, {groups[0].conditions.numbers}; full "
        f"attention has {_full(board)}."
        if groups
        else "No scores."
    )
    if board.clock is None:
        return lost
    said = board.clock.group.conditions
    return f"{lost} Times and bytes at a length: {said.model}, {said.numbers}, {said.place}."


def _full(board: Board) -> str:
    return " and ".join(
        f"{section.full:.0f} with the {asked(protocol)}"
        for protocol in PROTOCOLS
        for section in board.judged(protocol)[:1]
    )


def _needs(need: Need, found: Sequence[Answer], board: Board, points: float) -> Iterator[list[Cell]]:
    yield from (_need(one, one.entrant, one.sureness(points)) for one in found)
    if found:
        return
    why, ahead = missing(board, need, points), so_far(board, need, points)
    if ahead is not None:
        yield _need(ahead, f"{ahead.entrant} (so far)", f"{why}; {ahead.sureness(points)}")
        return
    nothing = number(None, formats.NOTHING)
    yield [label(need.title), label("nobody yet"), *[nothing] * 3, Cell(why), nothing]


def _need(one: Answer, name: str, sure: str) -> list[Cell]:
    won = _GAINS[one.need.won].format(_ratio(one.gain))
    samples = f"; {one.loss.samples} samples of {one.loss.tasks} tasks" if one.loss else ""
    return [
        label(one.need.title),
        label(name, page_of(one.entrant.partition(":")[0])),
        number(one.budget or None, _share(one.budget) if one.budget else _given(one.kept)),
        number(one.gain.value, f"{won} {_where(one)}", one.gain.low, one.gain.high),
        _points(one.loss) if one.loss else number(None, formats.NOTHING),
        Cell(sure + samples),
        Cell(_price(one)),
    ]


def _given(kept: float) -> str:
    """In place of a budget that nobody matched: what the options as given keep."""
    return f"as given, {formats.percent(kept)}" if math.isfinite(kept) else "as given"


def _price(one: Answer) -> str:
    """What gets worse, and at which budget that was read if it is another one."""
    if one.priced is None:
        return "not timed"
    found = ", ".join(_PRICES[what].format(formats.times(1 / ratio.value)) for what, ratio in one.price) or "none"
    return found if one.priced == one.budget else f"{found} (read at {at_budget(one.priced)})"


def _where(one: Answer) -> str:
    """At which length, and from which on."""
    if one.length is None:
        return "over the scored prompts"
    start = one.starts.partition(" (")[0]
    if start == "never":
        return f"at {one.length:,} tokens, not at longer ones"
    return f"at {one.length:,} tokens" + (f", from {start} on" if start != f"{one.length:,}" else "")


def losses_table(section: Section, name: str, up: str = "") -> Table:
    """One row an entrant: rank and loss."""
    head = ["method", "rank", "against full", "n, tasks", "kept", "options"]
    rows = [_standing(one, up) for one in section.standings]
    return Table(name, section.title, f"Full attention scores {section.full:.0f}. {_LOSS}", head, rows, labels=1)


def kinds_table(section: Section, name: str, up: str = "") -> Table:
    """One row an entrant: loss by kind of task."""
    note = f"Against full, which scores: {_scores(section.kinds)}. {_FEW}"
    rows = [[label(one.entrant, up + page_of(one.method)), *_by(one.kinds, section.kinds)] for one in section.standings]
    return Table(name, f"{section.title}: by kind of task", note, ["method", *section.kinds], rows, labels=1)


def _scores(means: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {mean:.0f}" for name, mean in means.items())


def suites_table(section: Section, name: str) -> Table:
    """One row an entrant: loss by suite and length of tasks."""
    note = f"Against full, which scores: {_scores(section.suites)}. {_FEW}"
    rows = [[label(one.entrant, page_of(one.method)), *_by(one.suites, section.suites)] for one in section.standings]
    return Table(name, f"{section.title}: by suite", note, ["method", *section.suites], rows, labels=1)


def _standing(one: Standing, up: str) -> list[Cell]:
    return [
        label(one.entrant, up + page_of(one.method)),
        _rank(one.rank),
        _points(one.loss),
        _counts(one.loss),
        number(one.kept, formats.percent(one.kept)),
        label(one.label.partition(":")[2] or formats.NOTHING),
    ]


def _by(found: Mapping[str, Found], names: Iterable[str]) -> list[Cell]:
    return [_points(found[name]) if name in found else number(None, formats.NOTHING) for name in names]


def times_table(clock: Clock, name: str, method: str | None = None, up: str = "") -> Table:
    """One row an entrant and length; of one method if it is named."""
    head = ["method", "budget", "kept", "length", "TTFT", "time a token", "end to end", "KV bytes", "n"]
    paces = sorted(clock.paces, key=lambda pace: (pace.length, -pace.ttft.value))
    rows = [
        [
            label(pace.entrant),
            number(pace.budget or None, _share(pace.budget)),
            number(pace.kept, formats.percent(pace.kept)),
            Cell(f"{pace.length:,}", pace.length, link=up + run_page(pace.entry)),
            *(number(one.value, _ratio(one), one.low, one.high) for one in (pace.ttft, pace.tpot, pace.e2e, pace.kv)),
            _count(pace.ttft),
        ]
        for pace in paces
        if method is None or pace.entrant.partition(":")[0] == method
    ]
    return Table(name, f"Times and memory: {clock.group.title}", _TIMES, head, rows, labels=1)


def runs_table(board: Board, folder: Path) -> Table:
    """One row a run: what it is of, and its records' file, which every number here is from."""
    head = ["run", "model", "numbers", "question", "device", "methods", "tasks", "samples a task", "records"]
    rows = [_run(entry, folder) for entry in board.entries]
    return Table("runs", "Runs", _RUNS, head, rows, labels=1)


def _run(entry: Entry, folder: Path) -> list[Cell]:
    run, said = entry.run, timed(entry)
    counts = run.records.groupby("task")["sample"].nunique()
    least, most = int(counts.min()), int(counts.max())
    file = next(path for path in (entry.folder / SAMPLES, entry.folder / PACKED) if path.is_file())
    return [
        label(entry.name, run_page(entry.name)),
        Cell(said.model),
        Cell(said.numbers),
        Cell(said.protocol),
        Cell(said.place),
        number(len(run.methods), str(len(run.methods))),
        number(len(run.tasks), str(len(run.tasks))),
        number(least, f"{least}" if least == most else f"{least} to {most}"),
        Cell(f"{len(run.records):,}", len(run.records), link=quote(os.path.relpath(file, folder))),
    ]


def cells_table(board: Board, method: str) -> Table:
    """Every task of one method, worst first."""
    head = ["task", "against full", "n", "score", "kept", "options", "protocol"]
    found = [row for section in board.sections for row in _cells(section, method)]
    rows = [row for _, row in sorted(found, key=lambda pair: pair[0])]
    return Table("cells", "Task by task, worst first", _CELLS, head, rows, labels=1)


def _cells(section: Section, method: str) -> Iterator[tuple[float, list[Cell]]]:
    own = section.rows[section.rows["method"] == method]
    for (entry, task, options), part in own.groupby(["entry", "task", "label"], sort=False):
        found = loss(part)
        row = [
            label(task, f"../{run_page(str(entry))}#samples"),
            _points(found),
            _count(found),
            number(part["score"].mean() * 100, formats.score(part["score"].mean() * 100)),
            number(part["kept"].mean(), formats.percent(part["kept"].mean())),
            label(options),
            label(section.group.conditions.protocol),
        ]
        yield (found.value if math.isfinite(found.value) else 0.0), row


def page_of(method: str) -> str:
    """Address of a method's page, from the board's."""
    return f"methods/{quote(method)}.html"


def run_page(entry: str) -> str:
    """Address of a run's page, from the board's."""
    return f"runs/{quote(entry)}/index.html"


def _points(found: Found) -> Cell:
    return number(found.value, formats.points(found.value, found.low, found.high), found.low, found.high)


def _count(found: Found) -> Cell:
    return number(found.samples, str(found.samples))


def _counts(found: Found) -> Cell:
    """Samples, and how many tasks and lengths they are of: others' may be easier."""
    return number(found.samples, f"{found.samples}, {found.tasks}")


def _ratio(found: Found) -> str:
    return formats.times(found.value) + formats.interval(found.low, found.high)


def _rank(rank: tuple[int, int, int] | None) -> Cell:
    if rank is None:
        return number(None, formats.NOTHING)
    place, first, last = rank
    return number(place, f"{place} [{first}, {last}]", first, last)


def _share(budget: float) -> str:
    return f"{budget:.3g}" if budget else formats.NOTHING
