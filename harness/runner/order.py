"""In which order methods answer the same sample, so that neither drift nor neighbours favour one of them.

A machine changes while it is measured, slowly (it warms up) and at once: what ran just before decides how much of its
power budget a device has left. So every order is followed by its mirror image, and every pair of them by another pair.
Over a whole cycle each method has each place equally often, and has each other one ahead of it equally often (E. J.
Williams, Experimental designs balanced for the estimation of residual effects of treatments, 1949).
"""

from __future__ import annotations


def order(count: int, number: int) -> list[int]:
    """The order of `count` methods for the `number`-th sample, from 0.

    A cycle has `count` samples where that is even, else twice as many.
    """
    # 0, 1, -1, 2, -2, ...: all differences between neighbours are different.
    zigzag = [(step + 1) // 2 * (1 if step % 2 else -1) for step in range(count)]
    row = [(place + number // 2) % count for place in zigzag]
    return row[::-1] if number % 2 else row
