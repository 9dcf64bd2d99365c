"""KeyDiff (Park et al., arXiv 2504.15364): keys unlike all others are the ones that queries attend to.

A token is worth what its key differs in direction from the anchor, the mean of all keys at unit length. The prompt
comes in by blocks: of the tokens that stayed so far and the next block, those that differ most from the anchor of just
these stay. No query is asked and nothing is protected.

Interpretations:
- keys are those that are cached, rotated to their positions, each KV head has its own anchor;
- the first `budget` tokens are there before the first block, and the last block may be shorter;
- the prefill attends to everything, and only its keys and values come in by blocks;
- cosines are float32, and of equal ones the earlier token stays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.cache import gather
from harness.engine.hardware import kernels_take
from harness.engine.step import Heads
from methods.common.best import best
from methods.common.evicting import Evicting
from methods.common.scores import head_norms


class KeyDiff(Evicting):
    """Keeps unlike keys."""

    name = "keydiff"
    summary = "KeyDiff: each KV head keeps the tokens whose keys differ most from their mean"
    parallel = True

    class Options(Evicting.Options):
        """How much, and in what steps."""

        block: Annotated[int, Field(ge=0)] = Field(128, description="tokens that come in at a time; 0: all; paper: 128")

    options: Options

    def looks(self) -> int:
        """At no query."""
        return 0

    def chosen(self, layers: range, heads: Heads) -> Callable[[], Tensor]:
        """What stays block by block, as lists: rounds take long, and few multiprocessors."""
        with self.model.part("score"):
            lengths = head_norms(heads.k)
        return partial(unlike_tokens, heads.k, lengths, self.budget(layers[0]), self.options.block or len(heads))


def unlike_tokens(k: Tensor, lengths: Tensor, count: int, block: int) -> Tensor:
    """Tokens that stay when the first `count` are there and the others come in `block` at a time.

    Args:
        k: [n, kv_heads, d], n more than `count`.
        lengths: of the keys, [n, kv_heads] float32.
        count: how many stay.
        block: tokens that come in at a time.

    Returns:
        [kv_heads, count] int64, ascending.
    """
    if kernels_take(k):
        from harness.engine.kernels.unlike_keys import unlike_keys

        stay: Tensor = unlike_keys(k, lengths, count, block)
        return stay
    directions = k / lengths.clamp(min=1e-12).unsqueeze(2)
    tokens = torch.arange(len(k), device=k.device).unsqueeze(1).expand(-1, k.shape[1])
    kept = tokens[:count]
    for new in torch.split(tokens[count:], block):
        seen = torch.cat((kept, new))
        kept = gather(seen, best(unlikeness(gather(directions, seen)), count).T)
    return kept.T


def unlikeness(directions: Tensor) -> Tensor:
    """How far keys at unit length, [n, kv_heads, d], point away from their mean: [kv_heads, n]."""
    # The anchor's own length is the same for all tokens of a head, so it changes no order.
    return -(directions * directions.mean(0)).sum(2).T
