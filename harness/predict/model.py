"""Times from work: a prefill is bound by products, a decode step by bytes, and a constant stays on any device.

    TTFT = host + flops / (reached * matrix rate)
    step = launches + bytes / (reached * memory rate), never less than the transfers beside it take
    E2E = TTFT + steps * step

`reached` is the share of a rate that a method's kernels reach; `host` and `launches` are seconds. Both pairs are fitted
for each method by least squares of relative errors over the lengths of a run, and are all that is carried from one
device to another. The constant is left out where the share alone explains a method's times within 1 %; a method that
was recorded at one length has full attention's.

Two kinds of work come on top of full attention's step at the same bytes, as what a method's steps take beyond it: keys
and values fetched from host memory in the open, by the host link's rate, and prompt tokens that decode computes after
all (LazyLLM's revival), by the matrix rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from harness.predict.device import Rates
from harness.predict.work import Cell, Run
from harness.statistics.paired import REFERENCE

_EXPLAINED = 0.01
"""Largest relative error that a share alone may leave."""


@dataclass(frozen=True)
class Line:
    """seconds = constant + factor * floor; `factor` is one over the share of the rate that is reached."""

    constant: float
    factor: float

    def at(self, floor: float) -> float:
        """Seconds for work that takes `floor` seconds at the device's rate."""
        return self.constant + self.factor * floor


@dataclass(frozen=True)
class Fit:
    """What is carried from one device to another.

    Attributes:
        prefill, decode: method label -> its line.
        revival: method label -> seconds over the floor of what it computes again.
        rates: of the device that was fitted.
    """

    prefill: dict[str, Line]
    decode: dict[str, Line]
    revival: dict[str, Line]
    rates: Rates


@dataclass(frozen=True)
class Times:
    """Seconds of one cell; NaN where the fit says nothing."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


def fit(run: Run, cells: Sequence[Cell] | None = None) -> Fit:
    """Fits every method of a run, or of some of its cells."""
    chosen, rates = run.cells if cells is None else list(cells), run.rates
    prefill = _lines(chosen, lambda cell: cell.ttft_s, lambda cell: cell.flops / rates.matrix)
    plain = [cell for cell in chosen if not cell.revived_flops and not cell.fetches_in_the_open]
    decode = _lines(plain, lambda cell: cell.tpot_s, lambda cell: cell.read_bytes / rates.memory)
    if REFERENCE not in decode:
        return Fit(prefill, decode, {}, rates)
    full = decode[REFERENCE]
    revival = {
        method: _share([(cell.revived_flops / rates.matrix, _over(cell, full, rates)) for cell in group])
        for method, group in _grouped([cell for cell in chosen if cell.revived_flops and cell.steps]).items()
    }
    return Fit(prefill, decode, revival, rates)


def together(fits: Sequence[Fit]) -> Fit:
    """What several runs tell; of a method that several have, the first one's. Shares need no rates to be compared."""
    found = fits[-1]
    for each in reversed(fits[:-1]):
        parts = (found.prefill | each.prefill, found.decode | each.decode, found.revival | each.revival)
        found = Fit(*parts, each.rates)
    return found


def predict(found: Fit, cell: Cell, rates: Rates) -> Times:
    """A cell's times on a device with these rates."""
    prefill = _line(found.prefill, cell.method)
    ttft = prefill.at(cell.flops / rates.matrix) if prefill else math.nan
    if not cell.steps:
        return Times(ttft, math.nan, ttft)
    decode = _decode(found, cell, rates)
    return Times(ttft, cell.tpot_s * decode / cell.decode_s, ttft + decode)


def _decode(found: Fit, cell: Cell, rates: Rates) -> float:
    """Seconds of all steps; where the first ones took longer than the median, they do so in proportion."""
    full, bus = found.decode.get(REFERENCE), found.rates.bus / rates.bus if found.rates.bus < math.inf else 1.0
    if cell.revived_flops:
        revival = _line(found.revival, cell.method)
        if full is None or revival is None:
            return math.nan
        return cell.steps * full.at(cell.read_bytes / rates.memory) + revival.at(cell.revived_flops / rates.matrix)
    if cell.fetches_in_the_open:
        if full is None:
            return math.nan
        return cell.steps * full.at(cell.read_bytes / rates.memory) + bus * _over(cell, full, found.rates)
    line = _line(found.decode, cell.method)
    if line is None:
        return math.nan
    return max(line.at(cell.read_bytes / rates.memory), cell.beside_s * bus) * cell.decode_s / cell.tpot_s


def _over(cell: Cell, full: Line, rates: Rates) -> float:
    """What a cell's steps take beyond those of full attention that read as many bytes."""
    return max(0.0, cell.decode_s - cell.steps * full.at(cell.read_bytes / rates.memory))


def _line(lines: dict[str, Line], method: str) -> Line | None:
    """Of the method, else of one with other options, else none."""
    kind = method.partition(":")[0]
    return lines.get(method) or next((line for label, line in lines.items() if label.partition(":")[0] == kind), None)


def _grouped(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    return {method: [cell for cell in cells if cell.method == method] for method in {cell.method for cell in cells}}


def _lines(cells: Sequence[Cell], seconds: Callable[[Cell], float], floor: Callable[[Cell], float]) -> dict[str, Line]:
    groups = _grouped([cell for cell in cells if seconds(cell) > 0])
    points = {method: [(floor(cell), seconds(cell)) for cell in group] for method, group in groups.items()}
    several = {method: _fitted(known) for method, known in points.items() if _spans(known)}
    constant = several[REFERENCE].constant if REFERENCE in several else 0.0
    single = {method: _through(known, constant) for method, known in points.items() if method not in several}
    return several | single


def _spans(points: Sequence[tuple[float, float]]) -> bool:
    floors = [floor for floor, _ in points]
    return max(floors) > 1.05 * min(floors)


def _fitted(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares of relative errors, neither part below 0."""
    alone = _share(points)
    if max(abs(alone.at(floor) / seconds - 1) for floor, seconds in points) <= _EXPLAINED:
        return alone
    floors, seconds = (np.array(column) for column in zip(*points, strict=True))
    (constant, factor), _ = nnls(np.stack([1 / seconds, floors / seconds], axis=1), np.ones(len(seconds)))
    return Line(float(constant), float(factor))


def _share(points: Sequence[tuple[float, float]]) -> Line:
    """Without a constant."""
    shares = np.array([floor / seconds for floor, seconds in points if seconds > 0])
    return Line(0.0, float(shares.sum() / (shares**2).sum()) if len(shares) else 0.0)


def _through(points: Sequence[tuple[float, float]], constant: float) -> Line:
    """The line through the middle of points that lie at one floor."""
    floor, seconds = (float(np.median(column)) for column in zip(*points, strict=True))
    constant = min(constant, seconds)
    return Line(constant, (seconds - constant) / floor)
