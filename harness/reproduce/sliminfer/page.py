"""The verdict on SlimInfer's claims as a page for people and as JSON for machines, beside the run it is about."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.report import formats
from harness.report.recorded import recorded
from harness.report.table import Cell, Table, label, number, to_markdown
from harness.report.tables import roofline
from harness.reproduce.claims import KV_TOLERANCE, Judgement, Measured, summary
from harness.reproduce.sliminfer.paper import E2E, LONGEST, TTFT
from harness.reproduce.sliminfer.records import Line, Readings
from harness.reproduce.sliminfer.verdict import differences, judge
from harness.statistics.paired import REFERENCE

NAME = "reproduction"
VERSION = 1

_RULE = (
    "A speed-up holds where its whole 95 % interval (trimmed geometric mean of ratios paired by sample) reaches the "
    "paper's figure, does not hold where the whole interval stays below, and is undecided else. Bytes hold within "
    f"{KV_TOLERANCE * 100:.0f} % of the figure."
)
_TABLE = (
    "Ratios are times of `full` over the method's. FLOP ideal: floating-point operations of `full`'s prefill over the "
    "method's, as recorded; reached: the measured TTFT ratio over that. Prompt KV: bytes allocated on the device, less "
    "the room for new tokens."
)


def write(readings: Readings, folder: Path) -> tuple[str, list[Judgement], list[Path]]:
    """Judges a run and writes `reproduction.md` and `reproduction.json` into its folder.

    Returns:
        The page, the judgements, the files.
    """
    judgements = judge(readings)
    text, page, data = markdown(readings, judgements), folder / f"{NAME}.md", folder / f"{NAME}.json"
    page.write_text(text, encoding="utf-8")
    data.write_text(json.dumps(as_json(readings, judgements), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return text, judgements, [page, data]


def markdown(readings: Readings, judgements: list[Judgement]) -> str:
    """The page: claims, table, how near the machine's limits that was, differences."""
    limits = roofline(recorded(NAME, readings.manifest, readings.records))
    tables = "\n".join(to_markdown(table) for table in (_claims(judgements), _table(readings), limits))
    others = "\n".join(f"- {line}" for line in differences(readings))
    head = f"# SlimInfer, arXiv 2508.06447: paper beside here\n\n**{summary(judgements)}.**"
    return f"{head}\n\n{tables}\n## What differs from the paper's setting\n\n{others}\n"


def as_json(readings: Readings, judgements: list[Judgement]) -> dict[str, Any]:
    """The same for machines; what is not known is null."""
    return {
        "version": VERSION,
        "claims_of": "sliminfer",
        "run_hash": readings.manifest.run_hash,
        "model": readings.manifest.model,
        "device": formats.device(readings.manifest),
        "shape": readings.setting.name if readings.setting else None,
        "summary": summary(judgements),
        "claims": [_nulled(_flat(judgement)) for judgement in judgements],
        "lines": [_nulled(asdict(line) | {"reached": line.reached}) for line in readings.lines],
        "differences": differences(readings),
    }


def _flat(judgement: Judgement) -> dict[str, Any]:
    found = asdict(judgement.measured or Measured(math.nan))
    return asdict(judgement.claim) | found | {"word": judgement.word, "reason": judgement.reason or None}


def _nulled(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _nulled(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _claims(judgements: list[Judgement]) -> Table:
    head = ["claim", "paper", "here", "verdict"]
    return Table("claims", "Claims", _RULE, head, [_claim(judgement) for judgement in judgements])


def _claim(judgement: Judgement) -> list[Cell]:
    claim, found = judgement.claim, judgement.measured
    here = label(formats.NOTHING) if found is None else _amount(found, claim.unit)
    verdict = judgement.word + (f": {judgement.reason}" if judgement.reason else "")
    return [label(claim.name), number(claim.figure, _figure(claim.figure, claim.unit)), here, label(verdict)]


def _amount(found: Measured, unit: str) -> Cell:
    return number(found.value, _figure(found.value, unit) + _interval(found), found.low, found.high)


def _figure(value: float, unit: str) -> str:
    return formats.times(value) if unit == "x" else formats.NOTHING if math.isnan(value) else f"{value:.2f} {unit}"


def _interval(found: Measured) -> str:
    # Three decimals: near a figure of two, the second is what the verdict turns on.
    return "" if math.isnan(found.low) else f" [{found.low:.3f}, {found.high:.3f}]"


def _table(readings: Readings) -> Table:
    most = readings.new_tokens[-1]
    head = ["prompt", "method", "n", "TTFT", "sooner", "paper", "FLOP ideal", "reached", "TPOT", f"E2E, {most} new"]
    head += ["faster", "paper", "prompt KV", "paper"]
    rows = [_row(readings, line) for line in readings.lines]
    return Table("sliminfer", "By prompt length", _TABLE, head, rows, labels=2)


def _row(readings: Readings, line: Line) -> list[Cell]:
    ttft, e2e, kv = _published(readings, line)
    return [
        label(line.length),
        label(line.method.partition(":")[0]),
        number(line.samples, str(line.samples)),
        number(line.ttft_s, formats.seconds(line.ttft_s)),
        _amount(line.ttft, "x"),
        ttft,
        number(line.ideal, formats.times(line.ideal)),
        number(line.reached, formats.percent(line.reached)),
        number(line.tpot_s, formats.seconds(line.tpot_s)),
        number(line.e2e_s, formats.seconds(line.e2e_s)),
        _amount(line.e2e, "x"),
        e2e,
        number(line.kv_gib, _gib(line.kv_gib)),
        kv,
    ]


def _published(readings: Readings, line: Line) -> tuple[Cell, Cell, Cell]:
    """The paper's figures for this row: TTFT, E2E, prompt KV."""
    setting, is_slim = readings.setting, line.method == readings.slim.label
    speeds = setting is not None and setting.speed and is_slim and line.length == LONGEST
    kv = setting.kv_gib.get(line.length) if setting and (is_slim or line.method == REFERENCE) else None
    figures = [TTFT.figure if speeds else None, E2E.figure if speeds else None, kv[int(is_slim)] if kv else None]
    units = ("x", "x", "GiB")
    cells = [
        number(figure, formats.NOTHING if figure is None else _figure(figure, unit))
        for figure, unit in zip(figures, units, strict=True)
    ]
    return cells[0], cells[1], cells[2]


def _gib(value: float) -> str:
    return formats.NOTHING if math.isnan(value) else f"{value:.2f} GiB" if value >= 0.1 else formats.size(value * 2**30)
