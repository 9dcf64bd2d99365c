"""`harness report`: every table, plot and page of recorded runs, from their records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from harness.errors import InputError
from harness.report.curves import against_length, parts, survivors
from harness.report.figures import save
from harness.report.grids import Grid, to_csv, to_latex, to_markdown
from harness.report.html import page
from harness.report.maps import needle_map, survival_map
from harness.report.plots import accuracy_ttft_figure
from harness.report.recorded import Recorded, read
from harness.report.sheets import sheets
from harness.stats import ALL


def report(runs: Sequence[Path | str], out: Path | str | None = None) -> list[Path]:
    """Writes the report of each run: into RUN/report, or into `out` (several runs: a folder each).

    Returns:
        The files written.

    Raises:
        InputError: a folder is not a run or is corrupt, two runs have the same name, or a file cannot be written.
    """
    folders = _folders(runs, out)
    return [path for run, folder in zip(runs, folders, strict=True) for path in build(read(run), folder)]


def build(run: Recorded, folder: Path) -> list[Path]:
    """Writes the report of one run into `folder`.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        grids = sheets(run)
        paths = [path for grid in grids for path in write_grid(grid, folder)]
        paths += [path for name, figure in figures(run) for path in save(figure, folder, name)]
        images = {path.stem: path.read_bytes() for path in paths if path.suffix == ".svg"}
        return [*paths, _write(folder / "index.html", page(run, grids, images))]
    except OSError as error:
        raise InputError(f"{folder}: cannot write the report: {error.strerror}") from None


def figures(run: Recorded) -> list[tuple[str, Figure]]:
    """(file name, figure) of every plot that the run has numbers for."""
    if run.records.empty:
        return []
    whole = {method: row for (task, method), row in run.effects.items() if task == ALL}
    summary = run.summary[run.summary["method"].isin(run.methods)]
    drawn = {
        "accuracy_ttft": accuracy_ttft_figure(run.manifest, summary, whole),
        "length": against_length(run),
        "parts": parts(run),
        "needles": needle_map(run) if run.scored else None,
        "survival": survival_map(run),
        "survivors": survivors(run),
    }
    return [(name, figure) for name, figure in drawn.items() if figure is not None]


def write_grid(grid: Grid, folder: Path) -> list[Path]:
    """Writes a table as `NAME.md`, `NAME.csv` and `NAME.tex`."""
    texts = {"md": to_markdown(grid), "csv": to_csv(grid), "tex": to_latex(grid)}
    return [_write(folder / f"{grid.name}.{ending}", text) for ending, text in texts.items()]


def _folders(runs: Sequence[Path | str], out: Path | str | None) -> list[Path]:
    if out is None:
        return [Path(run) / "report" for run in runs]
    if len(runs) == 1:
        return [Path(out)]
    names = [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise InputError("two runs have the same folder name; report them one at a time, each with its own --out")
    return [Path(out) / name for name in names]


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", errors="replace")
    return path
