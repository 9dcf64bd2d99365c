"""Several runs on one page, each with its advice, its table to decide by and a link to its own page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from harness.report.advice import advice, warnings
from harness.report.html import environment, facts, picture
from harness.report.recorded import Recorded
from harness.report.table import to_markdown
from harness.report.tables import decision

_NOTE = "The name of a run links to its page, with all tables, plots and samples."
_PLAIN_NOTE = "Runs are never pooled. All tables, plots and samples of a run are on its own page, `RUN/index.html`."
_PICTURES = ("accuracy_ttft", "length")


class Reported(NamedTuple):
    """One run whose report is written.

    Attributes:
        name: of the run's folder below the page.
        run: the run.
        images: name -> SVG.
    """

    name: str
    run: Recorded
    images: dict[str, bytes]


def overview(reported: Sequence[Reported]) -> str:
    """The page."""
    return environment().get_template("overview.html.j2").render(runs=[_shown(one) for one in reported], note=_NOTE)


def overview_markdown(reported: Sequence[Reported]) -> str:
    """The same in words and tables alone, for where HTML is not shown: it is whole without the files beside it."""
    return "\n".join(["# Recorded runs", "", _PLAIN_NOTE, "", *(line for one in reported for line in _section(one))])


def _shown(one: Reported) -> dict[str, object]:
    table = decision(one.run)
    return {
        "name": one.name,
        "link": f"{one.name}/index.html",
        "facts": facts(one.run),
        "advice": advice(one.run),
        "warnings": list(warnings(one.run)),
        "decision": table if table.rows else None,
        "images": [picture(name, one.images[name]) for name in _PICTURES if name in one.images],
    }


def _section(one: Reported) -> Iterator[str]:
    yield f"## {one.name}\n"
    yield f"{', '.join(f'{name} {value}' for name, value in facts(one.run))}\n"
    yield f"**{advice(one.run)}**\n"
    yield from (f"- {text}" for text in warnings(one.run))
    table = decision(one.run)
    if table.rows:
        yield "\n#" + to_markdown(table)
