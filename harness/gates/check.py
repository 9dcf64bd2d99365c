"""Regression gates: did a change make answers worse or methods slower? Silent where nothing says so.

    check(read_baseline(Path("results/baselines/cpu-smollm2.json")), digest_run(Path("results/main")))

Exact gates come first, since they say *what* changed (`harness.gates.exact`). Then what changed for the user: scores,
and the speed of each method beside full attention **in the same process**, so that a slower machine raises no alarm.

A bound is violated where the estimate lies beyond it, its interval excludes 0 and p is at most the level. Levels (5 %
for scores, 1 % for each kind of time, for joules and for each tail) hold for a whole check: they are divided by the
number of gates of that kind. A gate passes where its interval lies within the bound, or where there are enough samples
to have found a change as large as the bound. Otherwise it is undecided and says how many samples it needs; so is what
the run lacks, and every gate of fewer than `FEWEST` pairs. What is undecided has not passed: it fails a check that is
not told to let it pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.errors import InputError
from harness.gates.baseline import Baseline, SampleDigest
from harness.gates.costs import TAILS
from harness.gates.effects import Both, Moved, as_seconds, median_of, moved_score, moved_speed, reversed_seconds
from harness.gates.exact import exact_results, exactness_notes
from harness.gates.result import GateResult, Outcome
from harness.gates.tolerance import Tolerance, Undecided
from harness.statistics.estimators import ALPHA, FEWEST, SPEED_ALPHA
from harness.statistics.paired import ALL, REFERENCE, SPEEDS


@dataclass(frozen=True)
class Report:
    """What every gate of one check found.

    No violation does **not** mean that nothing got worse: changes below the tolerance pass, changes in undecided gates
    and in cells or samples that the baseline lacks were not seen, and ratios say nothing of what slows the methods and
    full attention alike. `undecided` says what undecided gates do to a check: "fail" it, or "pass".
    """

    baseline: str
    baseline_run: str
    run: str
    results: list[GateResult]
    notes: list[str]

    def of(self, outcome: Outcome) -> list[GateResult]:
        """Findings with this outcome, in the order of the gates."""
        return [result for result in self.results if result.outcome == outcome]

    def exit_code(self, undecided: Undecided = "fail") -> int:
        """1 where a bound is violated, or a gate undecided and that is to fail; else 0."""
        return int(bool(self.of("violated")) or (undecided == "fail" and bool(self.of("undecided"))))

    def summary(self, undecided: Undecided = "fail") -> str:
        """One line."""
        violated, open_, passed = (len(self.of(outcome)) for outcome in ("violated", "undecided", "passed"))
        word = "FAILED" if violated else "UNDECIDED" if open_ and undecided == "fail" else "passed"
        rule = "which fails it; --undecided pass lets them through" if undecided == "fail" else "let through"
        return (
            f"check {word}: {violated} violated, {open_} undecided{f' ({rule})' * bool(open_)}, {passed} passed; "
            f"run {self.run} against {self.baseline} (run {self.baseline_run})"
        )

    def lines(self, undecided: Undecided = "fail") -> list[str]:
        """Violations, then what is undecided, then notes, then the summary."""
        found = [*self.of("violated"), *self.of("undecided")]
        return [*map(str, found), *(f"note: {note}" for note in self.notes), self.summary(undecided)]


def check(base: Baseline, now: Baseline, tolerance: Tolerance | None = None) -> Report:
    """Compares a run with a baseline; see `Report` for what a pass does not mean.

    Args:
        base: what was recorded.
        now: the digest of the run (`harness.gates.baseline.digest_run`).
        tolerance: how much worse is still well.

    Raises:
        InputError: they cannot be compared: other weights, no cell in common, or other machines where seconds count.
    """
    tolerance = tolerance or Tolerance()
    cells = _cells(base, now)
    _refuse(base, now, cells, tolerance)
    results = [
        *_missing(base, now, cells),
        *exact_results(base, now, cells),
        *_score_results(cells, tolerance, base, now),
        *_cost_results(cells, tolerance, base, now),
    ]
    runs = str(base.provenance.get("run")), str(now.provenance.get("run"))
    return Report(base.name, *runs, results, _notes(base, now, cells))


def _cells(base: Baseline, now: Baseline) -> list[Both]:
    return [
        Both(method, task, cell, now.cells[method][task])
        for method, tasks in base.cells.items()
        for task, cell in tasks.items()
        if task in now.cells.get(method, {})
    ]


def _refuse(base: Baseline, now: Baseline, cells: Sequence[Both], tolerance: Tolerance) -> None:
    if base.provenance.get("weights") != now.provenance.get("weights"):
        raise InputError(f"the run is of other weights than the baseline {base.name!r}")
    if not cells:
        raise InputError(f"the run has no method and task in common with the baseline {base.name!r}")
    machines = now.provenance.get("machines")
    if tolerance.same_device and (not machines or len(machines) > 1 or machines != base.provenance.get("machines")):
        raise InputError("--same-device: run and baseline were not made on one and the same kind of machine")


def _missing(base: Baseline, now: Baseline, cells: Sequence[Both]) -> Iterator[GateResult]:
    """Cells, and samples of a cell, that the baseline has and the run does not."""
    for method, tasks in base.cells.items():
        for task in tasks:
            if task not in now.cells.get(method, {}):
                yield GateResult("missing", method, task, "undecided", "missing: the run has no such cell")
    for both in cells:
        if lost := both.lost():
            text = f"missing: {len(lost)} of the baseline's {both.base.n} samples (first: {lost[0]})"
            found = both.base.n - len(lost)
            yield GateResult("missing", both.method, both.task, "undecided", text, n=found, needed=both.base.n)


def _notes(base: Baseline, now: Baseline, cells: Sequence[Both]) -> list[str]:
    notes = [f"{both.name}: {_pairing(both)}" for both in cells if len(both.same_prompt()) < len(both.shared())]
    notes += exactness_notes(base, now)
    known = {(method, task) for method, tasks in base.cells.items() for task in tasks}
    new = [f"{m} x {t}" for m, tasks in now.cells.items() for t in tasks if (m, t) not in known]
    return notes + ([f"not in the baseline: {', '.join(new)}"] if new else [])


def _pairing(both: Both) -> str:
    """Why not all samples could be paired."""
    matched = len(both.same_prompt())
    how = "paired on these" if matched else "not paired, so compared as independent groups"
    return f"{matched} of the {len(both.shared())} samples that both have are the same prompt; {how}"


# Gates with an interval


class _Scale(NamedTuple):
    """How a kind of gate decides and prints.

    Attributes:
        bound: smallest change for the worse that counts, above 0, as a log or a fraction.
        alpha: level of this one gate.
        floor: changes within it are noise.
    """

    bound: float
    alpha: float
    floor: float = 0.0


def _score_results(cells: Sequence[Both], tolerance: Tolerance, base: Baseline, now: Baseline) -> list[GateResult]:
    groups = [[both] for both in cells]
    if tolerance.over == "median":
        methods = dict.fromkeys(both.method for both in cells)
        groups = [[both for both in cells if both.method == method] for method in methods]
    alpha, found = ALPHA / max(1, len(groups)), list[GateResult]()
    for group in groups:
        floor = max(_floor("score", both.task, base, now, 0.0) for both in group) / 100
        found += _score_result(group, _Scale(tolerance.points / 100, alpha, floor))
    return found


def _score_result(group: Sequence[Both], scale: _Scale) -> Iterator[GateResult]:
    tasks = [moved for both in group if (moved := moved_score(both, scale.bound, scale.alpha)) is not None]
    if not tasks:
        return
    moved = median_of(tasks)
    task = group[0].task if len(group) == 1 else f"median of {len(tasks)} tasks"
    outcome = _decide(moved, scale)
    numbers = [100 * value for value in (moved.base, moved.now, *moved.effect[2:5], -scale.bound)]
    base, now, change, low, high, bound = numbers
    text = (
        f"score {base:.1f} -> {now:.1f} points, change {change:+.1f} ({_interval(scale, '{:+.1f}', low, high)}, "
        f"bound {bound:+g}){_reason(moved, outcome, scale)}"
    )
    yield _result("score", group[0].method, task, outcome, text, (base, now, low, high, bound), moved)


def _cost_results(cells: Sequence[Both], tolerance: Tolerance, base: Baseline, now: Baseline) -> Iterator[GateResult]:
    """Times always, seconds of full attention on the same device alone, joules and tails where they are asked for."""
    methods = [both for both in cells if both.method != REFERENCE]
    full = [both for both in cells if both.method == REFERENCE] if tolerance.same_device else []
    alpha = SPEED_ALPHA / max(1, len(methods) + len(full))
    for both in (*methods, *full):
        yield from _gates(both, SPEEDS, tolerance.percent, alpha, base, now)
    more = (("energy", ("energy",), tolerance.energy), ("tail", tuple(TAILS), tolerance.tail))
    for kind, names, percent in [(kind, names, percent) for kind, names, percent in more if percent is not None]:
        for both in methods:
            found = list(_gates(both, names, percent, SPEED_ALPHA / len(methods), base, now))
            nothing = GateResult(kind, both.method, both.task, "undecided", f"{kind}: neither run has any to compare")
            yield from found or [nothing]


def _gates(
    both: Both, names: Sequence[str], percent: float, alpha: float, base: Baseline, now: Baseline
) -> Iterator[GateResult]:
    for name in names:
        floor = math.log(_floor(name, both.task, base, now, 1.0))
        yield from _cost_result(both, name, _Scale(math.log1p(percent / 100), alpha, floor))


def _floor(name: str, task: str, base: Baseline, now: Baseline, none: float) -> float:
    """The larger noise floor of the two runs: points, or a factor."""
    rows = [side.noise_floor.get(task, side.noise_floor.get(ALL, {})) for side in (base, now)]
    return max(none, *(row.get(name, none) for row in rows))


def _cost_result(both: Both, name: str, scale: _Scale) -> Iterator[GateResult]:
    def ratio(sample: SampleDigest) -> float | None:
        return sample.ratio.get(name)

    absolute = both.method == REFERENCE
    moved = moved_speed(both, reversed_seconds(name) if absolute else ratio, scale.bound, scale.alpha)
    if moved is None:
        return
    moved = as_seconds(moved) if absolute else moved
    outcome = _decide(moved, scale)
    change, low, high, bound = (math.exp(value) for value in (*moved.effect[2:5], -scale.bound))
    unit = "seconds" if absolute else "speed-up over full" if name in SPEEDS else "of full over its own"
    text = (
        f"{name} {unit} {moved.base:.4g} -> {moved.now:.4g}, change x{change:.3f} "
        f"({_interval(scale, 'x{:.3f}', low, high)}, bound x{bound:.3f}){_reason(moved, outcome, scale)}"
    )
    gate = f"full {name}" if absolute else name
    yield _result(gate, both.method, both.task, outcome, text, (moved.base, moved.now, low, high, bound), moved)


def _decide(moved: Moved, scale: _Scale) -> Outcome:
    """The word for an effect; see the module's docstring. A pass does not mean that there is no effect."""
    effect = moved.effect
    if moved.settled:
        return "passed"
    if effect.units < FEWEST:
        return "undecided"
    if effect.estimate < -max(scale.bound, scale.floor) and effect.high < 0 and effect.p <= scale.alpha:
        return "violated"
    enough = moved.needed is not None and effect.units >= moved.needed and effect.estimate >= -scale.bound
    return "passed" if effect.low >= -scale.bound or enough else "undecided"


def _reason(moved: Moved, outcome: Outcome, scale: _Scale) -> str:
    """Why it is undecided, and whether samples were paired."""
    how = "" if moved.paired else ", not paired"
    if outcome != "undecided":
        return how
    if moved.effect.estimate < -scale.bound and moved.effect.high < 0 and moved.effect.p <= scale.alpha:
        return f"{how}; undecided, full attention differs from itself by as much"
    if moved.needed is not None and moved.effect.units >= moved.needed:
        return f"{how}; undecided, too close to the bound to call"
    return f"{how}; undecided, {moved.effect.units} of {moved.needed or f'at least {FEWEST}'} needed"


def _interval(scale: _Scale, form: str, low: float, high: float) -> str:
    if math.isnan(low):
        return "no interval"
    return f"{100 - 100 * scale.alpha:.4g} % interval {form.format(low)} to {form.format(high)}"


def _result(
    gate: str, method: str, task: str, outcome: Outcome, text: str, numbers: tuple[float, ...], moved: Moved
) -> GateResult:
    baseline, now, low, high, bound = (value if math.isfinite(value) else None for value in numbers)
    n, needed, paired = moved.effect.n, moved.needed, moved.paired
    return GateResult(gate, method, task, outcome, text, baseline, now, low, high, bound, n, needed, paired)
