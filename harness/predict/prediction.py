"""Every cell of a run on another device, each number with the interval that the checks and the data sheet leave it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.predict.checks import QUANTITIES, Error, ratios, spread
from harness.predict.device import BUS_SHARE, MATRIX_SHARES, MEMORY_SHARES, Device, Rates, reading
from harness.predict.model import Fit, Times, predict
from harness.predict.work import Cell, Run
from harness.statistics.paired import REFERENCE

_USABLE = 0.95
"""Of a device's memory that a process gets."""


@dataclass(frozen=True)
class Guess:
    """A predicted number and its interval; the ends are NaN where nothing was checked."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """One cell on the device.

    Attributes:
        cell: what was recorded.
        guesses: quantity (`checks.QUANTITIES`) -> number; none of speed-ups for full attention itself.
        bounded: whether the joules are at most so many, at the board's limit, since the fitted runs counted none.
        fits: whether the recorded peak fits into the device's memory; None where no peak was recorded.
    """

    cell: Cell
    guesses: dict[str, Guess]
    bounded: bool
    fits: bool | None


def predict_run(run: Run, found: Fit, gpu: Device | None, device: Device, errors: Sequence[Error]) -> list[Prediction]:
    """All cells of a run.

    Args:
        run: whose work is to be done on the device.
        found: the fit; gpu: the card that it was fitted on, None where that is unknown.
        device: where to.
        errors: the checks, which make the intervals.
    """
    likely, slow, fast = _rates(found, gpu, device)
    predictions = []
    for cell in run.cells:
        kind = cell.method.partition(":")[0]
        spreads = {quantity: spread(errors, quantity, kind) for quantity in QUANTITIES}
        predictions.append(_prediction(run, found, cell, device, (likely, slow, fast), spreads))
    return predictions


def _prediction(
    run: Run, found: Fit, cell: Cell, device: Device, rates: Sequence[Rates], spreads: dict[str, float | None]
) -> Prediction:
    full = None if cell.method == REFERENCE else run.baseline(cell)
    likely, *ends = (_quantities(found, cell, full, each) for each in rates)
    guesses = {name: _guess(value, [end[name] for end in ends], spreads[name]) for name, value in likely.items()}
    peak = cell.peak_bytes
    fits = None if math.isnan(peak) else peak <= _USABLE * device.memory_gib * 2**30
    return Prediction(cell, guesses, math.isnan(found.draw), fits)


def _quantities(found: Fit, cell: Cell, full: Cell | None, rates: Rates) -> dict[str, float]:
    base: Times | None = predict(found, full, rates) if full else None
    return ratios(predict(found, cell, rates), base)


def _guess(value: float, ends: Sequence[float], apart: float | None) -> Guess:
    if apart is None:
        return Guess(value, math.nan, math.nan)
    return Guess(value, min(value, *ends) / (1 + apart), max(value, *ends) * (1 + apart))


def _rates(found: Fit, gpu: Device | None, device: Device) -> tuple[Rates, Rates, Rates]:
    """Likely, slowest and fastest; all the same where they were measured."""
    if device.lasting_tflops is not None and device.copy_gb_per_s is not None:
        known = _with(device, device.lasting_tflops * 1e12, device.copy_gb_per_s * 1e9)
        return known, known, known
    matrix, memory = device.matrix_tflops * 1e12, device.memory_gb_per_s * 1e9
    middle = [math.sqrt(low * high) for low, high in (MATRIX_SHARES, MEMORY_SHARES)]
    if gpu:
        middle = [found.rates.matrix / (gpu.matrix_tflops * 1e12), found.rates.memory / (gpu.memory_gb_per_s * 1e9)]
    shares = [tuple(middle), *zip(MATRIX_SHARES, MEMORY_SHARES, strict=True)]
    likely, slow, fast = (_with(device, matrix * share[0], memory * share[1]) for share in shares)
    return likely, slow, fast


def _with(device: Device, matrix: float, copy: float) -> Rates:
    return Rates(matrix, copy, device.bus_gb_per_s * 1e9 * BUS_SHARE, reading(copy, device), device.power_w)
