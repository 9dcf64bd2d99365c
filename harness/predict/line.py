"""Straight lines through times: a constant and a factor, neither below 0, by least squares of relative errors."""

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


def line(points: Points, constant: float = 0.0) -> Line:
    """The line; without a constant where the factor alone explains all points within 1 %.

    Args:
        points: one at least.
        constant: of the line where all points lie at one floor.
    """
    if not spans(points):
        return _through(points, constant)
    alone = share(points)
    if max(abs(alone.at(floor) / seconds - 1) for floor, seconds in points) <= EXPLAINED:
        return alone
    floors, seconds = (np.array(column) for column in zip(*points, strict=True))
    return least(1 / seconds, floors / seconds, np.ones(len(seconds)))


def spans(points: Points) -> bool:
    """Whether floors differ enough to tell a constant from a factor."""
    floors = [floor for floor, _ in points]
    return max(floors) > 1.05 * min(floors)


def share(points: Points) -> Line:
    """Without a constant."""
    shares = np.array([floor / seconds for floor, seconds in points if seconds > 0])
    return Line(0.0, float(shares.sum() / (shares**2).sum()) if len(shares) else 0.0)


def least(ones: np.ndarray, floors: np.ndarray, seconds: np.ndarray) -> Line:
    """Of equations `constant * ones + factor * floors = seconds`."""
    (constant, factor), _ = nnls(np.stack([ones, floors], axis=1), seconds)
    return Line(float(constant), float(factor))


def _through(points: Points, constant: float) -> Line:
    """The line through the middle of points that lie at one floor."""
    floor, seconds = (float(np.median(column)) for column in zip(*points, strict=True))
    constant = min(constant, seconds)
    return Line(constant, (seconds - constant) / floor)
