"""Times from work: a prefill is bound by products, or by the host that launches them, and a decode step by bytes.

    TTFT = the longer of host and start + flops / (reached * matrix rate)
    step = launches * latency + products + KV bytes / reading rate + chain
    E2E = TTFT + steps * step

`start` is what full attention's prefill takes where there is next to no work: the beginnings and ends of its launches,
in every layer. `products` is what reading the weights takes (`harness.predict.products`), and `chain` what a method's
steps take beyond full attention's at the same bytes: launches that wait for each other, in every layer, and keys and
values that it reads no faster than at a share of the rate. Fitted are, by least squares of relative errors over a run:
for each method `host` and `reached`, its two numbers of `chain`, neither below 0, and for full attention `start` and
`latency`, one number each. The rest is shapes and rates, so it serves other shapes and other devices. The host runs
ahead of the device, so what it takes shows where it takes longer, in short prompts; a CPU is its own host, and has
neither `host` nor `start`.

Steps that the engine's own kernels did not run, or not for one request (a CPU's, a batch's), are `weights / (reached *
copy rate) + KV bytes / (reached * copy rate)`, with a share of its own for both, fitted to the steps of all methods.
Where the shape is not known all bytes have one, and there is a `latency`.

Two kinds of work come on top of full attention's step at the same bytes: keys and values fetched from host memory in
the open, by the host link's rate, and prompt tokens that decode computes after all (LazyLLM's revival), by the matrix
rate. A request's joules are the board's limit times its time, or the share of the limit that the fitted runs drew.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import numpy as np

from harness.predict.device import Rates
from harness.predict.line import EXPLAINED, Bound, Line, bound, least_squares, line, share, spans
from harness.predict.work import Cell, Run
from harness.statistics.paired import REFERENCE

T = TypeVar("T")
_NOTHING = Line(0.0, 0.0)


@dataclass(frozen=True)
class Steps:
    """Full attention's: seconds a launch, and factors of the floors of weights, and of keys and values."""

    latency: float
    weights: float
    cache: float


@dataclass(frozen=True)
class Fit:
    """What is carried from one device to another.

    Attributes:
        prefill: method label -> of a layer, seconds of the host and of full attention's launches, and a factor of the
            floor of its operations.
        steps: what runs the steps (`Cell.engine`) -> full attention's.
        chains: method label -> beyond that: seconds a layer, and a factor of reading its keys and values.
        revival: the same of methods that compute prompt tokens again, with a factor of doing so.
        draw: mean watts over the board's limit; NaN where no joules were counted.
        rates: of the device that was fitted.
    """

    prefill: dict[str, Bound]
    steps: dict[str, Steps]
    chains: dict[str, Line]
    revival: dict[str, Line]
    draw: float
    rates: Rates


@dataclass(frozen=True)
class Times:
    """Seconds and joules of one cell; NaN where the fit says nothing."""

    ttft_s: float
    tpot_s: float
    e2e_s: float
    joules: float


def fit(run: Run, cells: Sequence[Cell] | None = None) -> Fit:
    """Fits every method of a run, or of some of its cells."""
    chosen, rates = run.cells if cells is None else list(cells), run.rates
    steps = _steps([cell for cell in chosen if cell.tpot_s > 0 and _plain(cell)], rates)
    known = [cell for cell in chosen if cell.engine in steps]
    chains = _grouped([cell for cell in known if cell.tpot_s > 0 and _plain(cell)])
    revived = _grouped([cell for cell in known if cell.revived_flops and cell.decode_s > 0])
    return Fit(
        _prefills(chosen, rates, run.host_apart),
        steps,
        {method: _chain(group, steps, rates) for method, group in chains.items()} | {REFERENCE: _NOTHING},
        {method: _revival(group, steps, rates) for method, group in revived.items()},
        draw(chosen, rates),
        rates,
    )


def together(fits: Sequence[Fit]) -> Fit:
    """What several runs tell; of a method that several have, the first one's. Shares need no rates to be compared."""
    return reduce(_joined, fits)


def predict(found: Fit, cell: Cell, rates: Rates) -> Times:
    """A cell's times and joules on a device with these rates."""
    prefill = _of(found.prefill, cell.method)
    ttft = cell.layers * prefill.at(cell.flops / rates.matrix / cell.layers) if prefill else math.nan
    step, tpot = (_step(found, cell, rates), _median_step(found, cell, rates)) if cell.steps else (0.0, math.nan)
    e2e = ttft + cell.steps * step
    return Times(ttft, tpot, e2e, e2e * rates.power * (1.0 if math.isnan(found.draw) else found.draw))


def draw(cells: Sequence[Cell], rates: Rates) -> float:
    """Mean watts over the board's limit, median of what was counted; NaN where nothing was."""
    shares = [cell.joules / cell.e2e_s / rates.power for cell in cells if cell.joules > 0]
    return statistics.median(shares) if shares else math.nan


def _joined(first: Fit, other: Fit) -> Fit:
    return Fit(
        other.prefill | first.prefill,
        other.steps | first.steps,
        other.chains | first.chains,
        other.revival | first.revival,
        other.draw if math.isnan(first.draw) else first.draw,
        first.rates,
    )


def _prefills(cells: Sequence[Cell], rates: Rates, host_apart: bool) -> dict[str, Bound]:
    points = {
        method: [(cell.flops / rates.matrix / cell.layers, cell.ttft_s / cell.layers) for cell in group]
        for method, group in _grouped(cells).items()
    }
    if not host_apart:
        return {method: Bound(0.0, 0.0, share(known).factor) for method, known in points.items()}
    full = line(points.pop(REFERENCE)) if REFERENCE in points else None
    found = {REFERENCE: Bound(0.0, full.constant, full.factor)} if full else {}
    return found | {method: bound(known, full) for method, known in points.items()}


def _steps(cells: Sequence[Cell], rates: Rates) -> dict[str, Steps]:
    engines = dict.fromkeys(cell.engine for cell in cells)
    return {engine: _launched([cell for cell in cells if cell.engine == engine], rates) for engine in engines}


def _launched(cells: Sequence[Cell], rates: Rates) -> Steps:
    """From full attention's steps, or from all where there are none."""
    chosen = [cell for cell in cells if cell.method == REFERENCE] or cells
    if all(cell.kernels for cell in cells):
        return Steps(_latency(chosen, rates), 1.0, 1.0)
    if all(cell.read_bytes > cell.kv_bytes for cell in cells):
        return _read(cells, rates)
    found = line([(sum(_floors(cell, rates)), cell.tpot_s) for cell in chosen])
    return Steps(found.constant / _launches(cells[0]), found.factor, found.factor)


def _latency(cells: Sequence[Cell], rates: Rates) -> float:
    shares = np.array([_launches(cell) / cell.tpot_s for cell in cells])
    rests = np.array([1 - sum(_floors(cell, rates)) / cell.tpot_s for cell in cells])
    return max(0.0, float((shares * rests).sum() / (shares**2).sum()))


def _read(cells: Sequence[Cell], rates: Rates) -> Steps:
    """A share for weights and one for keys and values; what is kept differs more among methods than among lengths."""
    weights, cache = np.array([_floors(cell, rates) for cell in cells]).T
    seconds = np.array([cell.tpot_s for cell in cells])
    if not spans([(floor, 0.0) for floor in cache]):
        factor = share([*zip(weights + cache, seconds, strict=True)]).factor
        return Steps(0.0, factor, factor)
    found = least_squares(weights / seconds, cache / seconds, np.ones(len(seconds)))
    return Steps(0.0, found.constant, found.factor)


def _chain(cells: Sequence[Cell], steps: dict[str, Steps], rates: Rates) -> Line:
    """A factor only where the constant alone does not explain the steps and lengths tell one from the other."""
    floors = np.array([cell.kv_bytes / rates.reads for cell in cells])
    beyond = np.array([cell.tpot_s - _base(steps, cell, rates) for cell in cells])
    weights, layers = 1 / np.array([cell.tpot_s for cell in cells]), np.array([cell.layers for cell in cells])
    alone = least_squares(weights * layers, 0 * floors, weights * beyond)
    left = weights * np.abs(beyond - alone.constant * layers)
    if left.max() <= EXPLAINED or not spans([(floor, 0.0) for floor in floors]):
        return alone
    return least_squares(weights * layers, weights * floors, weights * beyond)


def _revival(cells: Sequence[Cell], steps: dict[str, Steps], rates: Rates) -> Line:
    """A chain whose floor is what a step computes again, in the mean; without a constant where there is one floor."""
    floors = np.array([_revived(cell, rates) for cell in cells])
    beyond = np.array([cell.decode_s / cell.steps - _base(steps, cell, rates) for cell in cells])
    weights = np.array([cell.steps / cell.decode_s for cell in cells])
    layers = np.array([cell.layers for cell in cells])
    several = spans([(floor, 0.0) for floor in floors])
    return least_squares(weights * layers * several, weights * floors, weights * beyond)


def _revived(cell: Cell, rates: Rates) -> float:
    return cell.revived_flops / cell.steps / rates.matrix


def _step(found: Fit, cell: Cell, rates: Rates) -> float:
    """Mean seconds of the steps."""
    base = _base(found.steps, cell, rates)
    if cell.revived_flops:
        revival = _of(found.revival, cell.method) or Line(math.nan, math.nan)
        return base + revival.constant * cell.layers + revival.factor * _revived(cell, rates)
    if cell.fetches_in_the_open:
        return base + _slower_link(found, rates) * _over(cell, found.steps, found.rates) / cell.steps
    chain = _of(found.chains, cell.method) or Line(math.nan, math.nan)
    alone = base + chain.constant * cell.layers + chain.factor * cell.kv_bytes / rates.reads
    return max(alone, cell.beside_s * _slower_link(found, rates))


def _slower_link(found: Fit, rates: Rates) -> float:
    """By how much what crosses the host link takes longer there; as long where the fitted device has none."""
    return found.rates.bus / rates.bus if found.rates.bus < math.inf else 1.0


def _median_step(found: Fit, cell: Cell, rates: Rates) -> float:
    """Of steps that revive, the first ones by far the most, the median is as far from the mean as it was."""
    step = _step(found, cell, rates)
    return step * cell.tpot_s * cell.steps / cell.decode_s if cell.revived_flops and cell.tpot_s > 0 else step


def _base(steps: dict[str, Steps], cell: Cell, rates: Rates) -> float:
    """Full attention's step with a cell's bytes; NaN where no steps of that kind were fitted."""
    if (known := steps.get(cell.engine)) is None:
        return math.nan
    weights, cache = _floors(cell, rates)
    return known.latency * _launches(cell) + known.weights * weights + known.cache * cache


def _floors(cell: Cell, rates: Rates) -> tuple[float, float]:
    """Seconds of reading weights, and keys and values, at the device's rates."""
    if cell.kernels:
        return cell.kernels.seconds(rates.reads), cell.kv_bytes / rates.reads
    return (cell.read_bytes - cell.kv_bytes) / rates.memory, cell.kv_bytes / rates.memory


def _launches(cell: Cell) -> int:
    return cell.kernels.launches if cell.kernels else cell.layers


def _over(cell: Cell, steps: dict[str, Steps], rates: Rates) -> float:
    """What a cell's steps take, all together, beyond those of full attention that read as many bytes."""
    return max(0.0, cell.decode_s - cell.steps * _base(steps, cell, rates))


def _plain(cell: Cell) -> bool:
    return not cell.revived_flops and not cell.fetches_in_the_open


def _of(lines: dict[str, T], method: str) -> T | None:
    """Of the method, else of the one with most of its options and fewest others, the first of several; else none."""
    (kind, *options), known = method.split(":"), [label.split(":") for label in lines]
    same = [label for label in known if label[0] == kind]
    nearest = max(same, key=lambda label: (len({*label} & {*options}), -len({*label} - {*options})), default=None)
    return lines[":".join(nearest)] if nearest else None


def _grouped(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """In the order of the cells, since the first of several with other options speaks for all."""
    methods = dict.fromkeys(cell.method for cell in cells)
    return {method: [cell for cell in cells if cell.method == method] for method in methods}
