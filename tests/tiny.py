"""Tiny random models of every supported family, and short ways to run methods on them."""

from __future__ import annotations

import torch

from harness.conformance.tiny import (
    END,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    random_ids,
    tiny_engine,
    tiny_model,
    tiny_shape,
)
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.step import Step
from harness.models.load import FAMILIES
from harness.runner.catalog import parse_methods

__all__ = [
    "END",
    "FAMILIES",
    "HEADS",
    "HEAD_DIM",
    "HIDDEN",
    "LAYERS",
    "VOCAB",
    "build",
    "generate",
    "last_logits",
    "random_ids",
    "stock_verbs",
    "tiny_engine",
    "tiny_model",
    "tiny_shape",
]


def build(text: str, engine: Engine) -> Method:
    """The method that `--methods text` names, bound to the engine's model."""
    (spec,) = parse_methods(text)
    return spec.build(engine.context)


def generate(text: str, engine: Engine, ids: torch.Tensor, new_tokens: int = 8) -> list[int]:
    """New tokens under the method that `text` names."""
    return list(engine.stream(build(text, engine), Request(ids, new_tokens, frozenset([END]))))


def stock_verbs(graphed: Engine, stock: Engine) -> None:
    """Lends one engine the other's verbs, for recorded prefills too: interpreted products would take most time."""
    assert graphed.prefill is not None
    graphed.prefill._verbs = graphed.verbs = stock.verbs


def last_logits(engine: Engine, method: Method, ids: torch.Tensor, late: int, size: int) -> torch.Tensor:
    """Of the last of `late` tokens that come in behind the prefill, `size` a step."""
    early = len(ids) - late
    method.begin(early, late)
    engine.forward(method, ids[:early], Step("prefill", 0, early))
    for start in range(early, len(ids), size):
        last = engine.forward(method, ids[start : start + size], Step("decode", start, size))
    return last
