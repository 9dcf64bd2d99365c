"""How far a run moved from its baseline, as the gates see it: 0 is unmoved and above 0 is better.

Where both have the same sample with the same prompt, now and then are paired: differences of scores, logs of ratios of
ratios. Otherwise means of two independent groups are compared (Welch 1947), which needs many more samples. Times of
requests that were timed together, in either run, are one reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from harness.gates.baseline import CellDigest, SampleDigest, timings, units
from harness.statistics.estimators import FEWEST, Effect, Floats, Pairs, pairs, score_effect, speed_effect, trimmed_mean
from harness.statistics.power import MOST, flips_needed, pairs_needed, score_mde

Value = Callable[[SampleDigest], float | None]


class Both(NamedTuple):
    """A cell in the baseline and in the run."""

    method: str
    task: str
    base: CellDigest
    now: CellDigest

    @property
    def name(self) -> str:
        """As the gates' lines have it."""
        return f"{self.method} x {self.task}"

    def shared(self) -> list[str]:
        """Samples that both have, by id."""
        return sorted(self.base.samples.keys() & self.now.samples.keys())

    def lost(self) -> list[str]:
        """Samples of the baseline that the run lacks, or whose score it lacks."""
        base, now = self.base.samples, self.now.samples
        return [one for one in base if one not in now or (base[one].score is not None and now[one].score is None)]

    def same_prompt(self) -> list[str]:
        """Samples that both have with the same prompt: only these can be paired."""
        return [
            sample for sample in self.shared() if self.base.samples[sample].prompt == self.now.samples[sample].prompt
        ]


@dataclass(frozen=True)
class Moved:
    """An effect and what is needed to judge it.

    Attributes:
        effect: now against baseline; NaN where nothing is known.
        base, now: the two values themselves, for readers: mean score, or ratio or seconds.
        needed: samples that would decide at the bound; None where the spread is unknown.
        paired: whether samples were compared one by one.
        settled: there is nothing to estimate: not one answer, or not one time, differs.
    """

    effect: Effect
    base: float
    now: float
    needed: int | None = None
    paired: bool = True
    settled: bool = False


def moved_score(both: Both, bound: float, alpha: float) -> Moved | None:
    """Difference of mean scores, as a fraction; None where neither run has scores.

    Settled where every paired answer is the same text with the same score. That says nothing of other samples.

    Args:
        both: the cell.
        bound: the fall that has to be seen, as a fraction; for `needed`.
        alpha: level of interval and test.
    """
    groups = _values(both, lambda sample: sample.score)
    if groups is None:
        return None
    base, now, ids = groups
    if not ids:
        effect = _welch(base, now, np.mean, alpha)
        return Moved(effect, _mean(base), _mean(now), _scores_needed(effect, bound, alpha), paired=False)
    changes = pairs(now - base, _units(both, ids), both.name)
    effect = score_effect([changes], 1 - alpha)
    if not np.any(now != base) and _same_answers(both, ids):
        return Moved(_nothing(effect), _mean(base), _mean(now), settled=True)
    exact = changes.right_or_wrong or changes.constant
    needed = _flips_needed(changes, effect, bound, alpha) if exact else _scores_needed(effect, bound, alpha)
    return Moved(effect, _mean(base), _mean(now), needed)


def moved_speed(both: Both, value: Value, bound: float, alpha: float) -> Moved | None:
    """Log of (value now / value then), of a value that is better when it is larger; None where neither run has it.

    Args:
        both: the cell.
        value: a sample's ratio to full, or its speed.
        bound: the change that has to be seen, as a log; for `needed`.
        alpha: level of interval and test.
    """
    groups = _values(both, value)
    if groups is None:
        return None
    base, now, ids = groups
    old, new = np.log(base), np.log(now)
    if ids:
        timed = [timings(cell.samples[one] for one in ids) for cell in (both.base, both.now)]
        effect = speed_effect([pairs(new - old, _units(both, ids), timed=timed)], 1 - alpha)
    else:
        old, new = (_read(logs, cell, value) for logs, cell in ((old, both.base), (new, both.now)))
        effect = _welch(old, new, lambda logs: trimmed_mean(logs)[0], alpha)
    then, today = (math.exp(trimmed_mean(logs)[0]) for logs in (old, new))
    if len(ids) > 1 and not np.any(old != new):
        return Moved(_nothing(effect), then, today, settled=True)
    return Moved(effect, then, today, _pairs_needed(effect, bound, alpha), paired=bool(ids))


def median_of(tasks: Sequence[Moved]) -> Moved:
    """The median over tasks of everything.

    Where each task's true value lies in its interval, the median of those values lies between the medians of the ends.
    p is twice the median p, which is valid however the tasks depend on each other (Rüger 1978).
    """
    if len(tasks) == 1:
        return tasks[0]
    effects = [task.effect for task in tasks]
    n, estimate, low, high, p, se = (
        float(np.median([getattr(effect, name) for effect in effects]))
        for name in ("n", "estimate", "low", "high", "p", "se")
    )
    effect = Effect(int(n), int(n), estimate, low, high, min(1.0, 2 * p), se)
    needed = None if any(t.needed is None and not t.settled for t in tasks) else [t.needed or 0 for t in tasks]
    base, now = (float(np.median([getattr(task, name) for task in tasks])) for name in ("base", "now"))
    return Moved(
        effect, base, now,
        needed=None if needed is None else int(np.median(needed)),
        paired=all(task.paired for task in tasks),
        settled=all(task.settled for task in tasks),
    )  # fmt: skip


def reversed_seconds(name: str) -> Value:
    """Requests a second of full attention: larger is better, as with ratios."""

    def value(sample: SampleDigest) -> float | None:
        return 1 / sample.seconds[name] if name in sample.seconds else None

    return value


def as_seconds(moved: Moved) -> Moved:
    """The same with seconds for requests a second."""
    return replace(moved, base=1 / moved.base, now=1 / moved.now)


def _values(both: Both, value: Value) -> tuple[Floats, Floats, list[str]] | None:
    """Values then and now of the samples that can be paired; of all, and no ids, where none can."""
    base = {name: found for name, sample in both.base.samples.items() if (found := value(sample)) is not None}
    now = {name: found for name, sample in both.now.samples.items() if (found := value(sample)) is not None}
    if not base and not now:
        return None
    ids = [sample for sample in both.same_prompt() if sample in base and sample in now]
    if ids:
        return np.array([base[one] for one in ids]), np.array([now[one] for one in ids]), ids
    return np.array(list(base.values()), dtype=float), np.array(list(now.values()), dtype=float), []


def _read(logs: Floats, cell: CellDigest, value: Value) -> Floats:
    """Of all samples of a cell that have the value, those that were timed together as one."""
    known = [sample for sample in cell.samples.values() if value(sample) is not None]
    return pairs(logs, timed=[timings(known)]).values


def _units(both: Both, ids: Sequence[str]) -> list[int]:
    return units([both.now.samples[one] for one in ids])


def _same_answers(both: Both, ids: Sequence[str]) -> bool:
    answers = [(both.base.samples[one].answer, both.now.samples[one].answer) for one in ids]
    return all(old is not None and old == new for old, new in answers)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _nothing(effect: Effect) -> Effect:
    return Effect(effect.n, effect.units, 0.0, 0.0, 0.0, 1.0, 0.0)


def _welch(base: Floats, now: Floats, centre: Callable[[Floats], float], alpha: float) -> Effect:
    """Difference of the centres of two independent groups; `n` is the size of the smaller one."""
    number = min(len(base), len(now))
    if not number:
        return Effect(0, 0, math.nan)
    estimate = float(centre(now) - centre(base))
    trim = centre is not np.mean
    parts = [_spread(group, trim) for group in (base, now)]
    variance = sum(se**2 for se, _ in parts)
    if number < 2 or not variance > 0:
        return Effect(number, number, estimate)
    se, df = math.sqrt(variance), variance**2 / sum(se**4 / df for se, df in parts)
    half = float(stdtrit(df, 1 - alpha / 2)) * se
    p = float(2 * stdtr(df, -abs(estimate) / se))
    return Effect(number, number, estimate, estimate - half, estimate + half, p, se, df, 1.0, "Welch")


def _spread(values: Floats, trim: bool) -> tuple[float, float]:
    """Standard error of a centre, and its degrees of freedom."""
    if trim:
        return trimmed_mean(values)[1:]
    number = len(values)
    return (float(values.std(ddof=1)) / math.sqrt(number), number - 1.0) if number > 1 else (math.nan, math.nan)


def _pairs_needed(effect: Effect, bound: float, alpha: float) -> int | None:
    if math.isnan(effect.se):
        return None
    return pairs_needed(effect.se * math.sqrt(effect.units), math.exp(bound), alpha)


def _flips_needed(changes: Pairs, effect: Effect, bound: float, alpha: float) -> int | None:
    """Samples with which the exact test finds a fall as large as the bound, or as the one seen if that is larger."""
    if math.isnan(effect.se):
        return None
    won = 0.0 if changes.constant else float(np.mean(changes.sums > 0))
    lost = won + max(bound, -effect.estimate) / effect.step
    return flips_needed(min(lost, 1 - won), won, alpha)


def _scores_needed(effect: Effect, bound: float, alpha: float) -> int | None:
    """Samples with which that fall would be found with 80 % power, at this spread."""
    if math.isnan(effect.se):
        return None
    number, fall = FEWEST, max(bound, -effect.estimate)
    while number < MOST:
        se = effect.se * math.sqrt(effect.units / number)
        if score_mde(effect._replace(units=number, se=se, df=number - 1.0), alpha) <= fall:
            return number
        number += 1 + number // 50
    return MOST
