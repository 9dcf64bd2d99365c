"""The page of all published claims, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.report.table import Cell, Table, label, number, to_markdown
from harness.reproduce.claims import Measured, summary
from harness.reproduce.published.judge import Judged, words

NAME = "claims"
VERSION = 1
HEAD = ["method", "what", "where", "paper", "here", "verdict", "read from, or why not"]
NOTE = (
    "A ratio holds where its whole 95 % interval (trimmed geometric mean of ratios paired by sample) reaches the "
    "figure, does not hold where the whole interval stays below, and is undecided else, as with fewer than six pairs. "
    "Bytes hold from 99 % of the figure on. A word is about the device beside it, rarely the paper's; what is not "
    "applicable shows the nearest reading in brackets."
)


def write(judged: Sequence[Judged], folder: Path) -> tuple[str, list[Path]]:
    """Writes `claims.md` and `claims.json`.

    Raises:
        InputError: the folder cannot be written.
    """
    text, page, data = markdown(judged), folder / f"{NAME}.md", folder / f"{NAME}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        data.write_text(json.dumps(as_json(judged), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the claims: {error.strerror}") from None
    return text, [page, data]


def markdown(judged: Sequence[Judged]) -> str:
    """The table, headed."""
    return f"# Published claims beside here\n\n{to_markdown(table(judged))}"


def table(judged: Sequence[Judged]) -> Table:
    """One row a claim, those that were judged first."""
    counts = summary([one.judgement for one in judged])
    ordered = sorted(judged, key=lambda one: one.judgement.word == "not applicable")
    return Table(NAME, "Claims", f"{counts}. {NOTE}", HEAD, [_row(one) for one in ordered], labels=1)


def _row(one: Judged) -> list[Cell]:
    claim, found, aside = one.published, _shown(one), one.judgement.word == "not applicable"
    value, low, high = (found.value, found.low, found.high) if found else (None, None, None)
    upto = "up to " if claim.upto else ""
    here = words(found, claim.claim.unit)
    where = f"{claim.where}, {claim.setting}" + (f", {claim.length:,} tokens" if claim.length else "")
    return [
        label(claim.method),
        Cell(f"{claim.what}, {claim.measure}" if claim.measure != "none" else claim.what),
        Cell(where, link=claim.source),
        number(claim.claim.figure, upto + words(Measured(claim.claim.figure), claim.claim.unit)),
        number(value, f"({here})" if aside and found else here, low, high),
        Cell(_verdict(one), one.judgement.word),
        Cell("; ".join(filter(None, [one.judgement.reason, one.reading.words if one.reading else ""]))),
    ]


def _verdict(one: Judged) -> str:
    """The word, and the device that it is about where one was read."""
    word = one.judgement.word
    return f"{word} on {one.reading.device}" if one.reading and word in ("holds", "does not hold") else word


def _shown(one: Judged) -> Measured | None:
    return one.reading.found if one.reading else one.judgement.measured


def as_json(judged: Sequence[Judged]) -> dict[str, Any]:
    """The same for machines; what is not known is null."""
    return {"version": VERSION, "claims": [_entry(one) for one in judged]}


def _entry(one: Judged) -> dict[str, Any]:
    claim, found = one.published, _shown(one)
    values = asdict(found) if found else {}
    return {
        **{key: value for key, value in asdict(claim).items() if key != "claim"},
        **asdict(claim.claim),
        "measured": {key: value if value == value else None for key, value in values.items()} or None,
        "read_from": asdict(one.reading) | {"found": None} if one.reading else None,
        "verdict": one.judgement.word,
        "reason": one.judgement.reason,
    }
