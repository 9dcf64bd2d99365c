"""How wrong the model is where it can be checked: its short lengths against the long ones, one run against another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from harness.predict.model import Fit, Times, draw, fit, predict
from harness.predict.work import Cell, Run
from harness.statistics.paired import REFERENCE

QUANTITIES = ("ttft", "tpot", "e2e", "sooner", "faster", "energy")
"""What is predicted: three times, full attention's TTFT and E2E over the method's, joules."""
_MANY = 20
"""From so many checks on the interval is their 95 % quantile; below, the worst of them."""


@dataclass(frozen=True)
class Error:
    """One check.

    Attributes:
        how: what was fitted and what was predicted.
        method: label. length: prompt tokens. quantity: of `QUANTITIES`.
        log: natural logarithm of predicted over measured.
    """

    how: str
    method: str
    length: int
    quantity: str
    log: float

    @property
    def kind(self) -> str:
        """The method without its options."""
        return self.method.partition(":")[0]


def check(runs: Sequence[Run]) -> list[Error]:
    """Every check that these runs allow."""
    own = [error for run in runs for error in (*_longer(run), *_drawn(run))]
    return own + [error for known, other in permutations(runs, 2) for error in _other(known, other)]


def spread(errors: Sequence[Error], quantity: str, kind: str | None = None) -> float | None:
    """How far off, as a factor of 1 + x, a prediction of this quantity may be; None where nothing was checked.

    Args:
        errors: the checks.
        quantity: of `QUANTITIES`.
        kind: a method without its options; the checks of all methods where there are none of it.
    """
    chosen = [error for error in errors if error.quantity == quantity]
    own = [error for error in chosen if error.kind == kind]
    logs = [abs(error.log) for error in own or chosen]
    if not logs:
        return None
    return math.expm1(float(np.quantile(logs, 0.95)) if len(logs) >= _MANY else max(logs))


def ratios(ours: Times, full: Times | None) -> dict[str, float]:
    """Quantity -> value, for a cell and full attention's."""
    times = {"ttft": ours.ttft_s, "tpot": ours.tpot_s, "e2e": ours.e2e_s, "energy": ours.joules}
    return times if full is None else times | {"sooner": full.ttft_s / ours.ttft_s, "faster": full.e2e_s / ours.e2e_s}


def _longer(run: Run) -> Iterator[Error]:
    lengths = sorted({cell.length for cell in run.cells})
    short = lengths[: (len(lengths) + 1) // 2]
    if len(lengths) < 3:
        return
    found = fit(run, [cell for cell in run.cells if cell.length in short])
    how = f"{run.name}: from {short[0]}-{short[-1]} to longer"
    yield from errors_of(how, found, run, [cell for cell in run.cells if cell.length not in short])


def _drawn(run: Run) -> Iterator[Error]:
    """What other methods drew, beside a method's joules; the time is its own."""
    for cell in run.cells:
        others = draw([other for other in run.cells if other.method != cell.method], run.rates)
        if cell.joules > 0 and not math.isnan(others):
            joules = others * run.rates.power * cell.e2e_s
            how = f"{run.name}: watts of each method from the others'"
            yield Error(how, cell.method, cell.length, "energy", math.log(joules / cell.joules))


def _other(known: Run, other: Run) -> Iterator[Error]:
    found = fit(known)
    yield from errors_of(f"from {known.name} to {other.name}", found, other, other.cells)


def errors_of(how: str, found: Fit, run: Run, cells: Sequence[Cell]) -> Iterator[Error]:
    """How far off a fit is on some of a run's cells; `how` says what was fitted."""
    for cell in cells:
        full = None if cell.method == REFERENCE else run.baseline(cell)
        predicted = ratios(predict(found, cell, run.rates), predict(found, full, run.rates) if full else None)
        measured = ratios(_measured(cell), _measured(full) if full else None)
        for quantity in _checkable(found, cell):
            value, known = predicted.get(quantity, math.nan), measured.get(quantity, math.nan)
            if value > 0 and known > 0:
                yield Error(how, cell.method, cell.length, quantity, math.log(value / known))


def _checkable(found: Fit, cell: Cell) -> Iterator[str]:
    """Not what is worked out of the cell's own times, what it fetches in the open; nor joules that are a bound."""
    for quantity in QUANTITIES:
        own = cell.fetches_in_the_open and quantity in ("tpot", "e2e", "faster", "energy")
        if not own and (quantity != "energy" or not math.isnan(found.draw)):
            yield quantity


def _measured(cell: Cell) -> Times:
    return Times(cell.ttft_s, cell.tpot_s, cell.e2e_s, cell.joules)
