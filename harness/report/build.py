"""`harness report`: every table, plot and page of recorded runs, from their records alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from harness.errors import InputError
from harness.report.arrivals import arrivals_figure
from harness.report.curves import against_length, parts, survivors
from harness.report.density import density_map
from harness.report.figures import save
from harness.report.html import page
from harness.report.maps import needle_map, survival_map
from harness.report.overview import Reported, overview, overview_markdown
from harness.report.plots import accuracy_ttft_figure
from harness.report.recorded import Recorded, read
from harness.report.slo import Limit
from harness.report.table import Table, to_csv, to_latex, to_markdown
from harness.report.tables import tables
from harness.report.throughput import throughput, throughput_figure
from harness.report.turns import against_turn
from harness.statistics.paired import ALL
from harness.storage.store import MANIFEST


def report(runs: Sequence[Path | str], out: Path | str | None = None, slo: Sequence[Limit] = ()) -> list[Path]:
    """Writes the report of each run: into RUN/report, or into `out`.

    Several runs get a folder each in `out`, and `index.html` and `index.md` over all of them there. A folder that is no
    run but holds some stands for these.

    Args:
        runs: their folders.
        out: where to write.
        slo: limits for a table of goodput.

    Returns:
        The files written.

    Raises:
        InputError: a folder is not a run or is corrupt, two runs have the same name, or a file cannot be written.
    """
    found = _named(runs)
    if out is None:
        return [path for _, folder in found for path in _one(folder, folder / "report", slo)[1]]
    if [folder for _, folder in found] == [Path(one) for one in runs[:1]]:
        return _one(found[0][1], Path(out), slo)[1]
    if len(dict(found)) < len(found):
        raise InputError("two runs have the same folder name; report them one at a time, each with its own --output")
    return _together(found, Path(out), slo)


def _together(found: Sequence[tuple[str, Path]], out: Path, slo: Sequence[Limit]) -> list[Path]:
    """A folder for each run, and the pages over all of them."""
    paths: list[Path] = []
    reported = []
    for name, folder in found:
        run, written, images = _one(folder, out / name, slo)
        paths += written
        reported.append(Reported(name, run, images))
    texts = {"index.html": overview(reported), "index.md": overview_markdown(reported)}
    return paths + [_write(out / name, text) for name, text in texts.items()]


def _one(folder: Path, out: Path, slo: Sequence[Limit]) -> tuple[Recorded, list[Path], dict[str, bytes]]:
    """Reads one run and writes its report."""
    with _uncollected():
        run = read(folder)
        return run, *build(run, out, slo)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: looking through ten thousand records again and again is a fifth of all the work."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def build(run: Recorded, folder: Path, slo: Sequence[Limit] = ()) -> tuple[list[Path], dict[str, bytes]]:
    """Writes the report of one run into `folder`.

    Returns:
        The files, and the SVG of each plot by its name.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = tables(run, slo) + [table for table in [throughput([run])] if table.rows]
        paths = [path for table in found for path in write_table(table, folder)]
        paths += [path for name, figure in figures(run, slo) for path in save(figure, folder, name)]
        images = {path.stem: path.read_bytes() for path in paths if path.suffix == ".svg"}
        return [*paths, _write(folder / "index.html", page(run, found, images))], images
    except OSError as error:
        raise InputError(f"{folder}: cannot write the report: {error.strerror}") from None


def figures(run: Recorded, slo: Sequence[Limit] = ()) -> list[tuple[str, Figure]]:
    """(file name, figure) of every plot that the run has numbers for; goodput where there are limits."""
    if run.records.empty:
        return []
    whole = {method: row for (task, method), row in run.effects.items() if task == ALL}
    summary = run.summary[run.summary["method"].isin(run.methods)]
    drawn = {
        "accuracy_ttft": accuracy_ttft_figure(run.manifest, summary, whole),
        "turns": against_turn(run),
        "length": against_length(run),
        "parts": parts(run),
        "needles": needle_map(run) if run.scored else None,
        "survival": survival_map(run),
        "survivors": survivors(run),
        "density": density_map(run),
        "throughput": throughput_figure([run]),
        "load": arrivals_figure(run.contenders, run.methods, slo),
    }
    return [(name, figure) for name, figure in drawn.items() if figure is not None]


def write_table(table: Table, folder: Path) -> list[Path]:
    """Writes a table as `NAME.md`, `NAME.csv` and `NAME.tex`."""
    texts = {"md": to_markdown(table), "csv": to_csv(table), "tex": to_latex(table)}
    return [_write(folder / f"{table.name}.{ending}", text) for ending, text in texts.items()]


def _named(runs: Sequence[Path | str]) -> list[tuple[str, Path]]:
    """Name and folder of each run; the name of one inside a folder of runs is its path there."""
    found: list[tuple[str, Path]] = []
    for folder in map(Path, runs):
        inside = [] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.rglob(MANIFEST))
        found += [(path.relative_to(folder).as_posix(), path) for path in inside]
        found += [] if inside else [(folder.resolve().name, folder)]
    return found


def _write(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot write the report: {error.strerror}") from None
    return path
