"""How much memory to hold for requests that come one after the other, each of another length.

A recorded decode step keeps the addresses of the memory it works in, so memory that stays serves the next request
without a new recording. It must be enough, but a long prompt must not burden all short ones that follow.
"""

from __future__ import annotations

_TOO_MUCH = 4
"""Memory for this many times what is needed is given back."""

_STEPS = 4
"""Sizes between one power of two and the next."""


def capacity(needed: int, held: int) -> int:
    """What to hold for `needed` items where there is memory for `held`: that, if it is enough and not far too much.

    Else `needed` rounded up, at most by a quarter, so that requests of about one length find the same memory.
    """
    if needed <= held <= _TOO_MUCH * needed:
        return held
    step = max(1, (1 << max(0, needed - 1).bit_length()) // 2 // _STEPS)
    return -(-needed // step) * step
