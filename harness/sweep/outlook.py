"""What a sweep would ask, and how long that may take."""

from __future__ import annotations

from pathlib import Path

from harness.report.formats import duration
from harness.report.table import Table, label, number, to_markdown
from harness.runner.estimate import CellEstimate, Source, estimate, seen_near
from harness.sweep.cells import Sweep, SweepRun

_NOTE = (
    "Recorded: from requests like these that were recorded near here. Floor: full attention's FLOPs over this device's "
    "measured rate, and the weights read once a token; real requests take longer, small models on a CPU two to four "
    "times as long."
)
_WORDS: dict[Source, str] = {"recorded": "recorded", "floor": "floor", "unknown": "not known before the data is read"}


def outlook(sweep: Sweep, folder: Path) -> str:
    """The cells as a Markdown table, and sums.

    Args:
        sweep: checked.
        folder: of its runs; similar runs are looked for beside it.
    """
    seen = seen_near(folder.parent)
    found = [(run, cell) for run in sweep.runs for cell in estimate(run.spec, seen)]
    rows = [
        [
            label(run.folder),
            label(cell.task),
            label(cell.method),
            number(cell.samples, "?" if cell.samples is None else str(cell.samples)),
            number(cell.seconds, "?" if cell.seconds is None else duration(cell.seconds)),
            label(_WORDS[cell.source]),
        ]
        for run, cell in found
    ]
    head = ["run", "task", "method", "samples", "time", "estimated from"]
    return to_markdown(Table("outlook", sweep.grid.name, _NOTE, head, rows, labels=3)) + "\n" + _sums(found)


def _sums(found: list[tuple[SweepRun, CellEstimate]]) -> str:
    cells = [cell for _, cell in found]
    requests = sum(cell.samples or 0 for cell in cells)
    parts = []
    for source, words in (("recorded", "from recorded requests"), ("floor", "at least, from FLOPs and ceilings")):
        own = [cell for cell in cells if cell.source == source]
        if own:
            seconds = sum(cell.seconds or 0.0 for cell in own)
            parts.append(f"{duration(seconds)} {words} ({len(own)} cells)")
    unknown = sum(cell.source == "unknown" for cell in cells)
    parts += [f"{unknown} cells cannot be estimated"] if unknown else []
    return f"{len(cells)} cells, {requests} requests; {'; '.join(parts)}."
