"""Options with which methods keep the same number of tokens, although each means something else by its own.

What is matched is the mean of kept prompt tokens over layers and KV heads, as a share of the prompt, or of those that a
decode step attends to where all are kept: a method says it of a prompt's length before it sees a prompt
(`Method.asked_share`). The share in the braces of a method's text is then found by bisection, since more of it never
keeps less.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.method import Counted, ModelContext
from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.runner.catalog import parse_methods

TOLERANCE = 0.02
"""How far from a budget counts as meeting it, as a share of the budget."""
_HOLE = re.compile(r"\{(\d*\.?\d+|)(t?)\}")
_STEPS = 20
_EXACT = TOLERANCE / 4
_LEAST = 1e-4


@dataclass(frozen=True)
class Matched:
    """A method at a budget.

    Attributes:
        method: its name.
        budget: wanted share of the prompt; NaN where options are fixed.
        label: with the options that meet it; None where none do.
        share: what these come to; NaN where nothing says it before a prompt.
        kind: whether tokens are kept, or all kept and as many attended to by a decode step.
        reason: why there is no label.
    """

    method: str
    budget: float
    label: str | None
    share: float
    kind: Counted = "kept"
    reason: str = ""


@lru_cache(maxsize=4096)
def match(template: str, budget: float, shape: ModelShape, length: int) -> Matched:
    """A method's options for a budget, or why there are none.

    Args:
        template: the method, with braces: see `harness.study.study_file`.
        budget: share of the prompt.
        shape: of the model.
        length: prompt tokens.

    Raises:
        InputError: an unknown method or option, or one that does not fit the model.
    """
    name = template.partition(":")[0]
    if not _HOLE.search(template):
        share, kind = asked_share(template, shape, length)
        return Matched(name, math.nan, template, share, kind)
    least, kind = asked_share(filled(template, _LEAST, length), shape, length)
    most, _ = asked_share(filled(template, 1.0, length), shape, length)
    label = _closest(template, budget, shape, length)
    share, _ = asked_share(label, shape, length)
    if abs(share / budget - 1) <= TOLERANCE:
        return Matched(name, budget, label, share, kind)
    reason = f"`{template}` keeps {least:.1%} at least, {most:.1%} at most, at the nearest {share:.1%}"
    return Matched(name, budget, None, share, kind, reason)


def _closest(template: str, budget: float, shape: ModelShape, length: int) -> str:
    """The budget itself where that is as good as exact, which keeps labels short; else what bisection finds."""

    def apart(label: str) -> float:
        return abs(asked_share(label, shape, length)[0] / budget - 1)

    plain = filled(template, budget, length)
    if apart(plain) <= _EXACT:
        return plain
    low, high = _LEAST, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        share, _ = asked_share(filled(template, middle, length), shape, length)
        low, high = (middle, high) if share < budget else (low, middle)
    return min((filled(template, x, length) for x in (low, high)), key=apart)


def filled(template: str, share: float, length: int) -> str:
    """The text with numbers in its braces: `{}` the share, `{0.5}` half of it, `{t}` as tokens of the length."""

    def number(hole: re.Match[str]) -> str:
        part = share * float(hole[1] or 1)
        return (
            str(max(1, round(part * length)))
            if hole[2]
            else f"{min(1.0, max(part, _LEAST)):.4f}".rstrip("0").rstrip(".")
        )

    return _HOLE.sub(number, template)


def asked_share(label: str, shape: ModelShape, length: int) -> tuple[float, Counted]:
    """The share of a prompt's tokens that a method's options come to, mean over layers and KV heads."""
    (spec,) = parse_methods(label)
    spec.check(shape)
    method = spec.build(ModelContext(shape, Attention(), _not_now, _no_weight))
    return method.asked_share(length), method.counted


def _not_now(x: Tensor, by: Tensor) -> Tensor:
    raise InputError("a method moved keys before it had any")


def _no_weight(layer: int) -> Tensor:
    raise InputError("a method asked for weights before it had a prompt")
