"""Options with which methods keep the same number of tokens, although each means something else by its own.

What is matched is the mean of kept prompt tokens over layers and KV heads, as a share of the prompt: a method says it
of a prompt length before it sees a prompt (`Method.tokens_requested`). Some know it only behind one, some keep whole
blocks of what they ask for, and three keep all and attend to a part: for these `FORMULAS` says what their options come
to. The share in the braces of a method's text is then found by bisection, since more of it never keeps less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.method import ModelContext
from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.options import budget_tokens
from harness.runner.catalog import MethodSpec, parse_methods
from methods.common.schedule import budgets_in_tokens, pruning_layers, requested_tokens
from methods.lychee import roles

TOLERANCE = 0.02
"""How far from a budget counts as meeting it, as a share of the budget."""
_HOLE = re.compile(r"\{([0-9.]*)(t?)\}")
_STEPS = 20
_EXACT = TOLERANCE / 4
_LEAST = 1e-4

Kind = Literal["kept", "attended"]
Formula = Callable[[Any, ModelShape, int], float]


def _of_budget(options: Any, shape: ModelShape, length: int) -> float:
    return budget_tokens(options.budget, length) / length


def _of_schedule(options: Any, shape: ModelShape, length: int) -> float:
    return _scheduled(options, _tokens(options, length), shape, length)


def _of_blocks(options: Any, shape: ModelShape, length: int) -> float:
    """Whole blocks that fit each budget; the last one may be short, and stays."""
    kept, now, block = [], length, int(options.block)
    for tokens in _tokens(options, length):
        short = -now % block
        now = now if tokens >= now else (tokens + short) // block * block - short
        kept.append(now)
    return _scheduled(options, kept, shape, length)


def _tokens(options: Any, length: int) -> list[int]:
    least = (int(options.sink) + int(options.tail)) * int(options.block)
    return [max(least, tokens) for tokens in budgets_in_tokens(options.budgets, length)]


def _scheduled(options: Any, tokens: list[int], shape: ModelShape, length: int) -> float:
    layers = pruning_layers(options.layers, shape.layers)
    return sum(requested_tokens(layers, tokens, length, shape.layers)) / (length * shape.layers)


def _of_heads(options: Any, shape: ModelShape, length: int) -> float:
    heads = shape.layers * shape.kv_heads
    full = (heads - math.ceil(float(options.sparsity) * (heads - 1))) / heads
    return full + (1 - full) * min(1.0, float(options.sinks + options.recent) / length)


def _of_pages(options: Any, shape: ModelShape, length: int) -> float:
    dense, read = min(int(options.dense_layers), shape.layers), budget_tokens(options.budget, length) / length
    return (dense + (shape.layers - dense) * read) / shape.layers


def _of_found(options: Any, shape: ModelShape, length: int) -> float:
    near = int(options.sinks) + budget_tokens(options.recent, length)
    return min(1.0, (near + budget_tokens(options.topk, length)) / length)


def _of_roles(options: Any, shape: ModelShape, length: int) -> float:
    heads = [looks for layer in roles(options.heads, options.retrieval, shape) for looks in layer]
    all_of_it = sum(heads) / len(heads)
    return all_of_it + (1 - all_of_it) * budget_tokens(options.budget, length) / length


FORMULAS: dict[str, tuple[Kind, Formula]] = {
    "gemfilter": ("kept", _of_budget),
    "kvzip": ("kept", _of_budget),
    "slim": ("kept", _of_blocks),
    "random": ("kept", _of_blocks),
    "recent": ("kept", _of_blocks),
    "truncate": ("kept", _of_schedule),
    "duo": ("kept", _of_heads),
    "quest": ("attended", _of_pages),
    "lychee": ("attended", _of_roles),
    "retrieval": ("attended", _of_found),
}
"""Method -> what its options are counted in, and the share of the prompt that they come to."""


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
    kind: Kind = "kept"
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


def asked_share(label: str, shape: ModelShape, length: int) -> tuple[float, Kind]:
    """The share of a prompt's tokens that a method's options come to, mean over layers and KV heads."""
    (spec,) = parse_methods(label)
    spec.check(shape)
    if spec.kind.name in FORMULAS:
        kind, formula = FORMULAS[spec.kind.name]
        return formula(spec.options, shape, length), kind
    return _requested(spec, shape, length) / (shape.layers * length), "kept"


def _requested(spec: MethodSpec, shape: ModelShape, length: int) -> int:
    method = spec.build(ModelContext(shape, Attention(), _not_now, _no_weight))
    method.begin(length, 1)
    return sum(method.tokens_requested())


def _not_now(x: Tensor, by: Tensor) -> Tensor:
    raise InputError("a method moved keys before it had any")


def _no_weight(layer: int) -> Tensor:
    raise InputError("a method asked for weights before it had a prompt")
