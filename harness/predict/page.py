"""Predictions as a page, tables for machines and a plot; everything says that it is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness.predict.checks import QUANTITIES, Error, spread
from harness.predict.device import Device
from harness.predict.prediction import Guess, Prediction
from harness.predict.work import Run
from harness.report import formats
from harness.report.figures import canvas, colour_of, legend, marker_of, names_of, save, tidy
from harness.report.table import Cell, Table, label, number, to_csv, to_markdown

_NOTE = (
    "Nothing here was measured on this device: times are worked out of recorded operations and bytes "
    "(docs/predict.md). Intervals come from how far off the model was where it could be checked, below, and those of "
    "times and energy also from how much of its data sheet a card keeps up; without a check there is none. Energy: the "
    "board's power limit over the time, or the share of the limit that the fitted runs drew; *at most* where they "
    "counted no joules."
)
_CHECKED = (
    "How far predictions are off what was measured; *worst* names the prompt's length. An interval is as wide as 95 % "
    "of the checks of its method and quantity are off, or the worst of fewer than 20."
)
_NAMES = {
    "ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "sooner": "TTFT ratio", "faster": "E2E ratio", "energy": "energy",
}  # fmt: skip


def write(
    run: Run, device: Device, found: list[Prediction], errors: list[Error], folder: Path
) -> tuple[str, list[Path]]:
    """Writes `predicted.md`, `predicted.csv`, `errors.csv` and, for several lengths, `predicted.png` and `.svg`.

    Returns:
        The page and the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, checks = predictions_table(run, device, found), errors_table(errors)
    text = f"# Predicted: `{run.model}` on {device.title}\n\n{to_markdown(table)}\n{to_markdown(checks)}"
    files = {"predicted.md": text, "predicted.csv": to_csv(table), "errors.csv": to_csv(checks)}
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    figure = _figure(run, device, found)
    plots = save(figure, folder, "predicted") if figure else []
    return text, [*(folder / name for name in files), *plots]


def predictions_table(run: Run, device: Device, found: Sequence[Prediction]) -> Table:
    """One row a cell, which names its task where lengths and method do not tell it from the others."""
    names = [[label(each.cell.length), label(f"{each.cell.steps + 1:.0f}"), label(each.cell.method)] for each in found]
    head = ["prompt", "new", "method"]
    if len({tuple(cell.text for cell in name) for name in names}) < len(names):
        head = ["task", *head]
        names = [[label(each.cell.task), *name] for each, name in zip(found, names, strict=True)]
    rows = [[*name, *_numbers(each)] for each, name in zip(found, names, strict=True)]
    labels, title = len(head), f"Predicted for {device.title}, from `{run.name}` on {run.device}"
    head += ["TTFT", "sooner", "TPOT", "E2E", "faster", "peak memory", "fits", "energy"]
    return Table("predicted", title, _NOTE, head, rows, labels=labels)


def _numbers(found: Prediction) -> list[Cell]:
    guesses, cell = found.guesses, found.cell
    nothing = Guess(math.nan, math.nan, math.nan)
    ttft, tpot, e2e = (_time(guesses[name]) for name in ("ttft", "tpot", "e2e"))
    sooner, faster = (_ratio(guesses.get(name, nothing)) for name in ("sooner", "faster"))
    fits = formats.NOTHING if found.fits is None else "yes" if found.fits else "no"
    energy = _energy(guesses["energy"], found.bounded)
    memory = number(cell.peak_bytes, formats.size(cell.peak_bytes))
    return [ttft, sooner, tpot, e2e, faster, memory, label(fits), energy]


def _time(guess: Guess) -> Cell:
    between = "" if math.isnan(guess.low) else f" [{formats.seconds(guess.low)}, {formats.seconds(guess.high)}]"
    return number(guess.value, formats.seconds(guess.value) + between, guess.low, guess.high)


def _energy(guess: Guess, bounded: bool) -> Cell:
    most = "at most " if bounded and guess.value > 0 else ""
    between = "" if math.isnan(guess.low) else f" [{formats.joules(guess.low)}, {formats.joules(guess.high)}]"
    return number(guess.value, f"{most}{formats.joules(guess.value)}{between}", guess.low, guess.high)


def _ratio(guess: Guess) -> Cell:
    text = formats.times(guess.value) + formats.interval(guess.low, guess.high)
    return number(guess.value, text, guess.low, guess.high)


def errors_table(errors: Sequence[Error]) -> Table:
    """One row a method and quantity, and those of all methods."""
    kinds = [*dict.fromkeys(error.kind for error in errors)]
    rows = [row for kind in kinds for row in _error_rows(kind, [error for error in errors if error.kind == kind])]
    rows += _error_rows("all", errors)
    head = ["method", "quantity", "checks", "median error", "within 3 %", "within 10 %", "worst", "interval"]
    ways = "; ".join(dict.fromkeys(error.how for error in errors))
    return Table("errors", "Where it could be checked", f"{_CHECKED} Checks: {ways or 'none'}.", head, rows, labels=2)


def _error_rows(name: str, errors: Sequence[Error]) -> Iterator[list[Cell]]:
    for quantity in QUANTITIES:
        chosen = [error for error in errors if error.quantity == quantity]
        if not chosen:
            continue
        sizes = np.array([abs(math.expm1(error.log)) for error in chosen])
        worst, width = chosen[int(sizes.argmax())], spread(chosen, quantity) or 0.0
        yield [
            label(name),
            label(_NAMES[quantity]),
            number(len(chosen), str(len(chosen))),
            number(np.median(sizes), f"{np.median(sizes) * 100:.1f} %"),
            *(number((sizes <= size).mean(), formats.percent((sizes <= size).mean())) for size in (0.03, 0.1)),
            number(sizes.max(), f"{sizes.max() * 100:.1f} % ({worst.length})"),
            number(width, f"{width * 100:.1f} %"),
        ]


def _figure(run: Run, device: Device, found: Sequence[Prediction]) -> Figure | None:
    """TTFT, TPOT and E2E against length, with intervals; None for one length."""
    lengths = sorted({each.cell.length for each in found})
    if len(lengths) < 2:
        return None
    figure = canvas(13.2, 4.4)
    for axes, quantity in zip(figure.subplots(1, 3), ("ttft", "tpot", "e2e"), strict=True):
        for index, (method, name) in enumerate(names_of([*dict.fromkeys(each.cell.method for each in found)]).items()):
            points = [(each.cell.length, each.guesses[quantity]) for each in found if each.cell.method == method]
            known = {length: guess for length, guess in points if guess.value > 0}
            if not known:
                continue
            values = [guess.value for guess in known.values()]
            axes.plot(list(known), values, color=colour_of(index), marker=marker_of(index), linestyle="--", label=name)
            ends = [[guess.low for guess in known.values()], [guess.high for guess in known.values()]]
            axes.fill_between(list(known), *ends, color=colour_of(index), alpha=0.12, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="prompt tokens", title=f"predicted {_NAMES[quantity]} (s)")
        axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=8)
        axes.minorticks_off()
        tidy(axes)
    legend(figure)
    figure.suptitle(f"predicted, not measured: {run.model} on {device.title}", fontsize=11)
    return figure
