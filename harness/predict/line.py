"""What is drawn through times: a few numbers, none below 0, by least squares of relative errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

EXPLAINED = 0.01
"""Relative error a point that one more number has to explain."""
ALIKE = 0.03
"""What a bound costs that needs twice the factor of the method that it is compared with, beside squared errors."""

Points = Sequence[tuple[float, float]]
"""(what the device would take at its rate, what was measured), seconds."""


@dataclass(frozen=True)
class Line:
    """seconds = constant + factor * floor; `factor` is one over the share of the rate that is reached."""

    constant: float
    factor: float

    def at(self, floor: float) -> float:
        """Seconds for work that takes `floor` seconds at the device's rate."""
        return self.constant + self.factor * floor


@dataclass(frozen=True)
class Bound:
    """seconds = the longer of `least` and start + factor * floor."""

    least: float
    start: float
    factor: float

    def at(self, floor: float) -> float:
        """Seconds for work that takes `floor` seconds at the device's rate."""
        return max(self.least, self.start + self.factor * floor)


def bound(points: Points, like: Line | None = None) -> Bound:
    """The bound of least squared errors, of which a `least` has to take `EXPLAINED` squared a point.

    The points at `least` are those of the lowest floors. They may be all, where times hardly differ among floors.

    Args:
        points: at least one.
        like: another method's, that starts as this one does. Its factor is taken where all points are at `least`, and
            what the others say is the likelier the nearer it is to that.
    """
    known = sorted(points)
    return min(_bounds(known, like), key=lambda each: _cost(each, known, like))


def _bounds(known: Points, like: Line | None) -> Iterator[Bound]:
    start = like.constant if like else 0.0
    yield Bound(0.0, start, share(known, start).factor)
    for count in range(1, len(known)):
        if spans(known[count - 1 : count + 1]):
            yield Bound(_mean(known[:count]), start, share(known[count:], start).factor)
    if like and spans(known):
        yield Bound(_mean(known), start, like.factor)


def _cost(found: Bound, known: Points, like: Line | None) -> float:
    errors = sum((found.at(floor) / seconds - 1) ** 2 for floor, seconds in known)
    apart = found.factor / like.factor - 1 if like and like.factor else 0.0
    return errors + len(known) * (found.least > 0) * EXPLAINED**2 + ALIKE * apart**2


def _mean(known: Points) -> float:
    return 1 / float(np.mean([1 / seconds for _, seconds in known]))


def line(points: Points) -> Line:
    """The line; without a constant where the factor alone explains all points within 1 %, or they lie at one floor."""
    alone = share(points)
    if not spans(points) or max(abs(alone.at(floor) / seconds - 1) for floor, seconds in points) <= EXPLAINED:
        return alone
    floors, seconds = (np.array(column) for column in zip(*points, strict=True))
    return least_squares(1 / seconds, floors / seconds, np.ones(len(seconds)))


def spans(points: Points) -> bool:
    """Whether floors differ enough to tell a constant from a factor."""
    floors = [floor for floor, _ in points]
    return max(floors) > 1.05 * min(floors)


def share(points: Points, start: float = 0.0) -> Line:
    """With no other constant than `start`; where that is longer than what was measured, with none."""
    known = [(floor / seconds, 1 - start / seconds) for floor, seconds in points if seconds > start]
    shares, rests = (np.array(column) for column in zip(*known, strict=True)) if known else (np.zeros(0), np.zeros(0))
    return Line(start, float((shares * rests).sum() / (shares**2).sum()) if len(shares) else 0.0)


def least_squares(ones: np.ndarray, floors: np.ndarray, seconds: np.ndarray) -> Line:
    """Of equations `constant * ones + factor * floors = seconds`."""
    (constant, factor), _ = nnls(np.stack([ones, floors], axis=1), seconds)
    return Line(float(constant), float(factor))
