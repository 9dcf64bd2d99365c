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
    """The same for where Markdown is shown and HTML is not."""
    return "\n".join(["# Recorded runs", "", _NOTE, "", *(line for one in reported for line in _section(one))])


def _shown(one: Reported) -> dict[str, object]:
    table = decision(one.run)
    return {
        "name": one.name,
        "link": f"{one.name}/index.html",
        "facts": facts(one.run),
        "advice": advice(one.run),
        "warnings": list(warnings(one.run)),
        "decision": table if table.rows else None,
        "images": [picture(name, one.images[name]) for name in _pictures(one)],
    }


def _section(one: Reported) -> Iterator[str]:
    yield f"## [{one.name}]({one.name}/index.html)\n"
    yield f"{', '.join(f'{name} {value}' for name, value in facts(one.run))}\n"
    yield f"**{advice(one.run)}**\n"
    yield from (f"- {text}" for text in warnings(one.run))
    table = decision(one.run)
    if table.rows:
        yield "\n#" + to_markdown(table)
    for name in _pictures(one):
        yield f"![{picture(name, b'')['caption']}]({one.name}/{name}.png)\n"


def _pictures(one: Reported) -> list[str]:
    return [name for name in ("accuracy_ttft", "length") if name in one.images]
