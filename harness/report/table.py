"""A table before it has a format: what is in each cell, for Markdown, CSV, LaTeX and HTML alike."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.storage.cells import harmless


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: for people.
        value: for machines, to twelve digits; None where nothing was measured.
        low, high: ends of the 95 % interval of `value`, if it has one.
        leads: best, or not told from the best, by the paired tests of `harness.statistics.paired.leaders`.
        link: address of where the text comes from, on a page.
    """

    text: str
    value: Any = None
    low: float | None = None
    high: float | None = None
    leads: bool = False
    link: str | None = None


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: of its files.
        title: its heading.
        note: what the numbers mean.
        head: [columns] headings.
        rows: [rows][columns].
        labels: how many columns at the left hold labels; the others hold numbers or verdicts.
    """

    name: str
    title: str
    note: str
    head: list[str]
    rows: list[list[Cell]]
    labels: int = 1


def label(text: object, link: str | None = None) -> Cell:
    """A cell that names something."""
    return Cell(str(text), str(text), link=link)


def number(value: Any, text: str, low: Any = None, high: Any = None, leads: bool = False) -> Cell:
    """A cell with a number; NaN and NA become None. What leads must have been measured."""
    known = steady(value)
    return Cell(text, known, steady(low), steady(high), leads and known is not None)


def steady(value: Any) -> Any:
    """`plain`, to twelve digits: how the last ones of a sum come out differs from processor to processor."""
    known = plain(value)
    return float(f"{known:.12g}") if isinstance(known, float) else known


def plain(value: Any) -> Any:
    """A number as Python and JSON know it, None for null, NaN and NA."""
    if value is None or pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value


def to_markdown(table: Table) -> str:
    """A Markdown table with its heading and note; what leads is bold."""
    rule = [":---" if index < table.labels else "---:" for index in range(len(table.head))]
    body = [[_markdown_cell(cell, index < table.labels) for index, cell in enumerate(row)] for row in table.rows]
    head = [text.replace("|", "\\|") for text in table.head]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))
    return f"## {table.title}\n\n{table.note}\n\n{lines}\n"


def to_csv(table: Table) -> str:
    """CSV of the values for machines; intervals and marks have columns of their own, null is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [_parts(table, index) for index in range(len(table.head))]
    lines = [[head + suffix for head, names in zip(table.head, parts, strict=True) for suffix in names.values()]]
    lines += [
        [getattr(cell, name) for cell, names in zip(row, parts, strict=True) for name in names] for row in table.rows
    ]
    writer.writerows([harmless(value) for value in line] for line in lines)
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A LaTeX table for the package booktabs; what leads is bold."""
    columns = "l" * table.labels + "r" * (len(table.head) - table.labels)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escaped(table.title)}. {escaped(table.note)}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        _latex_row(map(escaped, table.head)),
        "\\midrule",
        *(_latex_row(map(_latex_cell, row)) for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "[": "{[}",  # after the end of a row it would be taken for the distance to the next
}


def _parts(table: Table, index: int) -> dict[str, str]:
    """Attributes of the cells of this column that are written out, and what their headings end in."""
    cells = [row[index] for row in table.rows]
    parts = {"value": ""}
    if any(cell.low is not None for cell in cells):
        parts |= {"low": " low", "high": " high"}
    return parts | ({"leads": " leads"} if any(cell.leads for cell in cells) else {})


def _markdown_cell(cell: Cell, is_label: bool) -> str:
    text = cell.text.replace("|", "\\|").replace("\n", " ")
    if is_label:
        return "`" + text.replace("`", "'") + "`"
    if cell.link is not None and cell.link.startswith("https://"):  # others lead from a page of HTML to another
        return f"[{text}]({cell.link})"
    return f"**{text}**" if cell.leads else text


def _latex_cell(cell: Cell) -> str:
    return f"\\textbf{{{escaped(cell.text)}}}" if cell.leads else escaped(cell.text)


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"
