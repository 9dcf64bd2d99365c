"""What is drawn through times: two numbers, neither below 0, by least squares of relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

EXPLAINED = 0.01
"""Largest relative error that one of the two alone may leave."""

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
    """seconds = the longer of `least` and factor * floor."""

    least: float
    factor: float

    def at(self, floor: float) -> float:
        """Seconds for work that takes `floor` seconds at the device's rate."""
        return max(self.least, self.factor * floor)


def off(found: Line | Bound, points: Points) -> float:
    """The largest relative error."""
    return max(abs(found.at(floor) / seconds - 1) for floor, seconds in points)


def bound(points: Points) -> Bound:
    """The bound: the points of the lowest floors lie at `least`, none if that explains no more than 1 % of a point."""
    known = sorted(points)
    found = Bound(0.0, share(known).factor)
    for count in range(1, len(known)):
        least = 1 / float(np.mean([1 / seconds for _, seconds in known[:count]]))
        other = Bound(least, share(known[count:]).factor)
        if spans(known[count - 1 : count + 1]) and off(other, known) < off(found, known) - EXPLAINED:
            found = other
    return found


def line(points: Points) -> Line:
    """The line; without a constant where the factor alone explains all points within 1 %, or they lie at one floor."""
    alone = share(points)
    if not spans(points) or off(alone, points) <= EXPLAINED:
        return alone
    floors, seconds = (np.array(column) for column in zip(*points, strict=True))
    return least_squares(1 / seconds, floors / seconds, np.ones(len(seconds)))


def spans(points: Points) -> bool:
    """Whether floors differ enough to tell a constant from a factor."""
    floors = [floor for floor, _ in points]
    return max(floors) > 1.05 * min(floors)


def share(points: Points) -> Line:
    """Without a constant."""
    shares = np.array([floor / seconds for floor, seconds in points if seconds > 0])
    return Line(0.0, float(shares.sum() / (shares**2).sum()) if len(shares) else 0.0)


def least_squares(ones: np.ndarray, floors: np.ndarray, seconds: np.ndarray) -> Line:
    """Of equations `constant * ones + factor * floors = seconds`."""
    (constant, factor), _ = nnls(np.stack([ones, floors], axis=1), seconds)
    return Line(float(constant), float(factor))
