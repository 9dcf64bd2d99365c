"""Methods against a reference, paired by (task, sample): what a run can say about them, and what it cannot.

    compare(load("results/main"))

`compare` gives numbers, `verdict` puts them into a word, `leaders` says which methods nothing in a task is shown to
beat. Formulas, their sources and their coverage are in `harness.statistics.estimators` and docs/statistics.md.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.errors import InputError
from harness.statistics.comparable import comparable
from harness.statistics.estimators import (
    ALPHA,
    FEWEST,
    SPEED_ALPHA,
    Effect,
    Floats,
    Pairs,
    holm,
    pairs,
    score_effect,
    score_p,
    speed_effect,
    trimmed_mean,
)
from harness.statistics.power import score_mde, speed_mde
from harness.statistics.together import together

REFERENCE = "full"
ALL = "all"
SPEEDS = ("ttft", "tpot", "e2e")
COSTS = {**{name: f"{name}_s" for name in SPEEDS}, "energy": "energy_j"}
"""What less of is better, compared as ratios, and the column of the records that has it."""
MEASURES = ("score", *COSTS)
MARGIN_POINTS = 5.0
MARGIN_RATIO = 1.05

_FIELDS = ("low", "high", "p", "p_holm", "mde")
COLUMNS = [
    *("method", "task", "n", "units", "score_test", "score_n", "score_difference"),
    *(f"score_{field}" for field in _FIELDS),
    *(f"{name}_{field}" for name in COSTS for field in ("n", "ratio", *_FIELDS)),
]

Verdict = Literal["better", "worse", "no difference", "within noise", "undecided"]


def compare(
    records: pd.DataFrame,
    reference: str = REFERENCE,
    confidence: float = 1 - ALPHA,
    seed: int = 0,
    by: str = "task",
) -> pd.DataFrame:
    """Every other method against the reference, on the samples that both answered.

    Rows `all` weigh all tasks that every method has records of the same, so that no method gets the easier ones.
    Samples whose `extra["context_hash"]` is the same within a task are one cluster. Times of different cards make no
    pair (`cards`), those of requests that were decoded together are one (`together`), and what is of another thing than
    a request has no part in times and energy (`comparable`).

    Args:
        records: one row a record (`harness.storage.store.load`).
        reference: label of the method to compare with.
        confidence: of the intervals.
        seed: of resampling; equal records and seeds give equal numbers, whatever other methods the run has.
        by: another column of the records: a row, its value called `task`, is then over the tasks that have the value,
            each counting the same as in `all` (those without a measure not at all), and there is no row `all`.

    Returns:
        `COLUMNS`, one row a task and method, `all` last; empty where the run lacks the reference. Scores in points of
        100, method minus reference; ratios are times (and joules, `energy`) of the reference over those of the method,
        so above 1 is better.
        `*_n` pairs with both values, times of a batch one of them. `*_p_holm` is adjusted over the methods x tasks of
        its measure (over the methods for `all`); a label `REFERENCE#...` is the reference once more and not part of
        that. `*_mde` is the smallest true effect that has 80 % power at the level of Holm's first step: infinite where
        nothing could be found.
        Of fewer than `FEWEST` units there are estimates alone: intervals and p are NaN.

    Raises:
        InputError: a method has a sample of a task twice.
    """
    methods = [str(label) for label in dict.fromkeys(records["method"])]
    cells = [
        _cell(method, task, group, reference, confidence, seed, whole=by == "task")
        for task, group in _groups(records, by)
        for method in methods
        if method != reference and reference in methods and _has(group, {method, reference})
    ]
    return pd.DataFrame(_rows(cells, reference), columns=COLUMNS)


def speedups(records: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """The estimates of `compare` alone, of the reference too (1, by definition).

    Returns:
        One row a method and task, index (method, task), columns of `COSTS`; NaN where there is no pair.
    """
    rows = {
        (method, panel.task): [_speedup(panel.pairs(name, method, reference)) for name in COSTS]
        for panel in _panels(records)
        if reference in panel.methods
        for method in panel.methods
    }
    index = pd.MultiIndex.from_arrays([[m for m, _ in rows], [t for _, t in rows]], names=["method", "task"])
    return pd.DataFrame(list(rows.values()), index=index, columns=list(COSTS), dtype=float)


def verdict(
    estimate: float,
    low: float,
    high: float,
    p: float,
    *,
    margin: float,
    alpha: float,
    floor: float = 0.0,
    mde: float = 0.0,
) -> Verdict:
    """One word for an effect, on a scale where 0 is none and more is better (points; logs of ratios).

    - `better`, `worse`: p is at most `alpha`, the interval does not hold 0, and the effect exceeds the noise floor.
    - `within noise`: as above, but a second run of the reference differs from the first by as much.
    - `no difference`: the whole interval lies within +-`margin` (Schuirmann 1987). It does **not** mean that there is
      none: effects below the margin are possible, likely even where the interval does not hold 0. Nor does it speak of
      single samples: as many may have got better as worse. Nor of other lengths, tasks or machines.
    - `undecided`: all else. It does **not** mean "no difference": an effect as large as the far end of the interval is
      compatible with what was seen, and one well below the minimum detectable effect would usually have been missed.

    Args:
        estimate, low, high: the effect and its interval; NaN where unknown.
        p: adjusted for the family that the effect is read with.
        margin: effects smaller than this do not matter.
        alpha: share of families without any effect in which one is called better or worse.
        floor: noise floor (`harness.statistics.noise.noise_floor`).
        mde: minimum detectable effect; infinite where no result could have been called better or worse, which leaves
            `undecided`.
    """
    if p <= alpha and (low > 0 or high < 0):
        if abs(estimate) <= floor:
            return "within noise"
        return "better" if estimate > 0 else "worse"
    return "no difference" if mde < math.inf and -margin <= low and high <= margin else "undecided"


def verdicts(
    comparison: pd.DataFrame,
    floors: pd.DataFrame | None = None,
    margin_points: float = MARGIN_POINTS,
    margin_ratio: float = MARGIN_RATIO,
) -> pd.DataFrame:
    """Adds a `*_verdict` and the noise `*_floor` it was called with, if any, for each measure.

    Scores are called at `ALPHA`, times at `SPEED_ALPHA`: timings are cheap and false alarms are not.

    Args:
        comparison: of `compare`.
        floors: of `harness.statistics.noise.noise_floor`; a task without a floor takes that of `all`.
        margin_points, margin_ratio: what is too small to matter.
    """
    known = {} if floors is None else {row["task"]: row for row in floors.to_dict("records")}
    rows = comparison.to_dict("records")
    table = comparison.copy()
    for name in MEASURES:
        margin = margin_points if name == "score" else math.log(margin_ratio)
        floor = [known.get(row["task"], known.get(ALL, {})).get(f"{name}_floor", math.nan) for row in rows]
        words = [_word(name, row, margin, limit) for row, limit in zip(rows, floor, strict=True)]
        table[f"{name}_verdict"] = pd.Series(words, index=table.index, dtype=object)
        table[f"{name}_floor"] = pd.Series(floor, index=table.index, dtype=float)
    return table


def costs(comparison: pd.DataFrame) -> list[str]:
    """The costs that a table of `compare` speaks of: times, and what else was measured."""
    return [name for name in COSTS if name in SPEEDS or comparison[f"{name}_ratio"].notna().any()]


def leaders(records: pd.DataFrame, measure: str, seed: int = 0, by: str = "task") -> set[tuple[str, str]]:
    """The methods of each task that no other is shown to beat, where the run can tell any two apart at all.

    The method with the best estimate is tested against each other one, paired, with Holm's adjustment over those
    tests; it and all that it is not told apart from are returned. Where it is told apart from none, nothing is: a set
    of everyone names no best. Being in the set does **not** mean being as good as the best: with few samples a much
    worse method may not be told apart from it.

    Args:
        records: one row a record, without A/A twins.
        measure: one of `MEASURES`.
        seed: of sign flips.
        by: see `compare`.

    Returns:
        (task, method), of task `all` too.
    """
    return {(task, method) for task, group in _groups(records, by) for method in _lead(group, measure, seed)}


def cards(records: pd.DataFrame) -> list[str]:
    """The chip that answered each request: a GPU by its UUID, a CPU by its name and host; "" in older records.

    What was asked again after a change of code (`redo`) stands apart: that was at another time.
    """
    workers, redone = ([*records[name]] if name in records else [None] * len(records) for name in ("worker", "redo"))
    return [
        _card(one) + (f", redo {again}" if pd.notna(again) else "") for one, again in zip(workers, redone, strict=True)
    ]


def _card(worker: Any) -> str:
    if not isinstance(worker, dict):
        return ""
    return str(worker.get("gpu_uuid") or f"{worker.get('device')} of {worker.get('host')}")


@dataclass(frozen=True)
class _Panel:
    """One task: a row a sample, a column a method; costs as logs, what is missing NaN; cards and batches by number."""

    task: str
    methods: list[str]
    units: NDArray[np.int64]
    present: NDArray[np.bool_]
    values: dict[str, Floats]
    cards: NDArray[np.int64]
    timed: NDArray[np.int64]

    def pairs(self, measure: str, method: str, reference: str) -> Pairs:
        """Differences, above 0 where the method is better than the reference."""
        sign = 1.0 if measure == "score" else -1.0
        values = self.values[measure]
        one, other = self.methods.index(method), self.methods.index(reference)
        differences, label = sign * (values[:, one] - values[:, other]), f"{method}\0{self.task}"
        if measure == "score":
            return pairs(differences, self.units, label)
        differences[self.cards[:, one] != self.cards[:, other]] = np.nan
        return pairs(differences, self.units, label, [self.timed[:, one], self.timed[:, other]])

    def centre(self, measure: str, method: str) -> float:
        """Mean score, or minus the trimmed mean of log times: more is better."""
        column = self.methods.index(method)
        values = self.values[measure][:, column]
        if measure == "score":
            return float(values.mean())
        return -trimmed_mean(pairs(values, timed=[self.timed[:, column]]).values)[0]

    def shared(self, *methods: str) -> NDArray[np.int64]:
        """Units of the samples that all of these methods have a record of."""
        return self.units[self.present[:, [self.methods.index(method) for method in methods]].all(axis=1)]


class _Cell(NamedTuple):
    """One row of a comparison before it is written out."""

    method: str
    task: str
    n: int
    units: int
    effects: dict[str, Effect]


def _panels(records: pd.DataFrame) -> list[_Panel]:
    if records.duplicated(["method", "task", "sample"]).any():
        raise InputError("a method has answered a sample of a task twice; records of one run at a time can be compared")
    records = comparable(records)
    columns = {name: records[name].to_numpy(dtype=object) for name in ("method", "sample")}
    columns["unit"] = np.array(_clusters(records), dtype=object)
    columns["card"] = pd.factorize(np.array(cards(records), dtype=object))[0]
    columns["timed"] = together(records)
    columns["score"] = records["score"].to_numpy(dtype=float, na_value=np.nan)
    for name, column in COSTS.items():
        known = records[column].to_numpy(dtype=float, na_value=np.nan) if column in records else np.nan
        cost = np.broadcast_to(known, len(records))
        columns[name] = np.log(np.where(cost > 0, cost, np.nan))
    numbers, tasks = pd.factorize(records["task"])
    rows = [np.flatnonzero(numbers == number) for number in range(len(tasks))]
    return [
        _panel(str(task), {name: column[own] for name, column in columns.items()})
        for task, own in zip(tasks, rows, strict=True)
    ]


def _panel(task: str, group: Mapping[str, NDArray[Any]]) -> _Panel:
    """Of the columns of a task's records."""
    rows, samples = pd.factorize(group["sample"])
    columns, methods = pd.factorize(group["method"])
    values = {}
    for name in MEASURES:
        values[name] = np.full((len(samples), len(methods)), np.nan)
        values[name][rows, columns] = group[name]
    units = np.zeros(len(samples), dtype=np.int64)
    units[rows] = pd.factorize(group["unit"])[0]
    present = np.zeros((len(samples), len(methods)), dtype=bool)
    present[rows, columns] = True
    where, timed = (np.full((len(samples), len(methods)), -1, dtype=np.int64) for _ in range(2))
    where[rows, columns], timed[rows, columns] = group["card"], group["timed"]
    return _Panel(task, [str(method) for method in methods], units, present, values, where, timed)


def _clusters(records: pd.DataFrame) -> list[str]:
    """What samples have in common: their context where it is known, else only themselves."""
    samples = records["sample"].astype(str)
    if "extra" not in records:
        return ["sample " + sample for sample in samples]
    shared = [extra.get("context_hash") if isinstance(extra, dict) else None for extra in records["extra"]]
    return [f"context {c}" if c is not None else "sample " + s for c, s in zip(shared, samples, strict=True)]


def _groups(records: pd.DataFrame, by: str) -> Iterator[tuple[str, list[_Panel]]]:
    """Each task, then those together that all methods have records of; or those of each value of another column."""
    if by != "task":
        for value, part in records.groupby(by, sort=False):
            yield str(value), _of_all_methods(_panels(part))
        return
    panels = _panels(records)
    for panel in panels:
        yield panel.task, [panel]
    if panels:
        yield ALL, _of_all_methods(panels)


def _of_all_methods(panels: Sequence[_Panel]) -> list[_Panel]:
    methods = {method for panel in panels for method in panel.methods}
    return [panel for panel in panels if methods <= set(panel.methods)]


def _has(group: Sequence[_Panel], methods: set[str]) -> bool:
    return all(methods <= set(panel.methods) for panel in group)


def _cell(
    method: str, task: str, group: list[_Panel], reference: str, confidence: float, seed: int, *, whole: bool
) -> _Cell:
    """`whole`: what one of the tasks has no values of, all together have no effect of."""
    found = {name: [panel.pairs(name, method, reference) for panel in group] for name in MEASURES}
    tasks = {name: [task for task in panels if whole or len(task.values)] for name, panels in found.items()}
    effects = {name: speed_effect(tasks[name], confidence) for name in COSTS}
    effects["score"] = score_effect(tasks["score"], confidence, seed)
    effects = {name: _of_enough(effect) for name, effect in effects.items()}
    shared = [panel.shared(method, reference) for panel in group]
    return _Cell(method, task, sum(map(len, shared)), sum(len(np.unique(units)) for units in shared), effects)


def _of_enough(effect: Effect) -> Effect:
    """The effect; of too few units its estimate alone."""
    return effect if effect.units >= FEWEST else Effect(effect.n, effect.units, effect.estimate)


def _rows(cells: Sequence[_Cell], reference: str) -> list[dict[str, Any]]:
    """Columns, with what depends on the other rows: Holm's p and the level of the minimum detectable effect."""
    rows: list[dict[str, Any]] = [cell._asdict() | {"score_test": cell.effects["score"].test} for cell in cells]
    families = defaultdict(list)
    for index, cell in enumerate(cells):
        families[cell.task == ALL, cell.method.startswith(f"{reference}#")].append(index)
    for name, family in itertools.product(MEASURES, families.values()):
        adjusted = holm([cells[index].effects[name].p for index in family])
        tests = max(1, int((~np.isnan(adjusted)).sum()))
        for index, p in zip(family, adjusted, strict=True):
            rows[index] |= _columns(name, cells[index].effects[name], float(p), tests)
    return rows


def _columns(name: str, effect: Effect, p_holm: float, tests: int) -> dict[str, Any]:
    if name == "score":
        values = np.array([effect.estimate, effect.low, effect.high, score_mde(effect, ALPHA / tests)]) * 100
    else:
        values = np.exp([effect.estimate, effect.low, effect.high, speed_mde(effect, SPEED_ALPHA / tests)])
    names = ("difference" if name == "score" else "ratio", "low", "high", "mde")
    row: dict[str, Any] = {f"{name}_{field}": float(value) for field, value in zip(names, values, strict=True)}
    return row | {f"{name}_n": effect.n, f"{name}_p": effect.p, f"{name}_p_holm": p_holm}


def _word(name: str, row: dict[Hashable, Any], margin: float, floor: float) -> Verdict:
    names = ("difference" if name == "score" else "ratio", "low", "high", "mde")
    numbers = [float(row[f"{name}_{field}"]) for field in names]
    alpha = ALPHA if name == "score" else SPEED_ALPHA
    if name != "score":
        numbers, floor = np.log(numbers).tolist(), math.log(floor)
    estimate, low, high, mde = numbers
    return verdict(estimate, low, high, float(row[f"{name}_p_holm"]), margin=margin, alpha=alpha, floor=floor, mde=mde)


def _lead(group: Sequence[_Panel], measure: str, seed: int) -> set[str]:
    methods = [name for name in (group[0].methods if group else []) if _measured(group, measure, name)]
    group = [_complete(panel, measure, methods) for panel in group]
    if len(methods) < 2 or not all(len(panel.units) for panel in group):
        return set()
    means = [np.mean([panel.centre(measure, name) for panel in group]) for name in methods]
    best = methods[int(np.argmax(means))]
    others = [name for name in methods if name != best]
    tests = [[panel.pairs(measure, name, best) for panel in group] for name in others]
    if not all(map(_tells, tests)):
        return set()
    p = holm([score_p(tasks, seed)[0] if measure == "score" else speed_effect(tasks).p for tasks in tests])
    alpha = ALPHA if measure == "score" else SPEED_ALPHA
    beaten = {name for name, value in zip(others, p, strict=True) if value <= alpha}
    return set(methods) - beaten if beaten else set()


def _tells(tasks: Sequence[Pairs]) -> bool:
    """Whether there are units enough for a p."""
    counts = [len(task.counts) for task in tasks]
    return min(counts) >= 2 and sum(counts) >= FEWEST


def _speedup(values: Pairs) -> float:
    return math.exp(speed_effect([values]).estimate)


def _measured(group: Sequence[_Panel], measure: str, method: str) -> bool:
    return all(np.isfinite(panel.values[measure][:, panel.methods.index(method)]).any() for panel in group)


def _complete(panel: _Panel, measure: str, methods: Sequence[str]) -> _Panel:
    """The samples of which all methods have the measure, times of one card."""
    columns = [panel.methods.index(name) for name in methods]
    rows = np.isfinite(panel.values[measure][:, columns]).all(axis=1)
    if measure != "score":
        rows &= (panel.cards[:, columns] == panel.cards[:, columns[:1]]).all(axis=1)
    values = {measure: panel.values[measure][rows]}
    return replace(panel, units=panel.units[rows], values=values, cards=panel.cards[rows], timed=panel.timed[rows])
