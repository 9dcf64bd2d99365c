"""MInference 1.0 (Jiang et al., arXiv 2407.02490): a prefill along vertical lines and slashes.

The prompt's last 64 queries look at all keys. The columns and the diagonals that they attend to most are attended to
by every row: columns as single keys, diagonals as blocks of 64 keys (`methods.common.vertical_slash`). The first 30
columns and the 100 nearest offsets always are. A query head has its own numbers of columns and diagonals, which the
authors searched offline and published as JSON files: `heads=FILE` reads one. Without a file all heads have the pair
that their code gives to heads that are not in it; below some 6,000 tokens that is dense.

Interpretations:
- scores are float32, and of equal ones the earlier column and the nearer offset are chosen;
- the published files name vertical lines and slashes for all heads, so other patterns are refused.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from harness.engine.shape import ModelShape
from harness.engine.sparse import Choice
from harness.engine.step import Heads
from harness.options import Budget, OptionSet, budget_tokens
from methods.common.head_file import by_head, check_heads, read_json
from methods.common.scores import last_attention
from methods.common.sparse_prefill import SparsePrefill
from methods.common.vertical_slash import offset_sums, vertical_slash

_LAST, _COLUMNS, _OFFSETS = 64, 30, 100
_LEAST_OFFSETS = 50
Count = Annotated[int, Field(ge=1)]


class Lines(NamedTuple):
    """A head's entry in the file: columns, diagonals, and what the search thought of them."""

    pattern: Literal["vertical_and_slash"]
    vertical: Count
    slash: Count
    score: float = 0.0


Layers = list[dict[int, Lines]]
HeadFile = Annotated[Layers | None, BeforeValidator(lambda path: read_json(path, Layers))]


class MInference(SparsePrefill):
    """Attends to columns and diagonals."""

    name = "minference"
    summary = "MInference: the prefill attends to columns and diagonals that the last queries look at"
    parallel = True
    nothing = MappingProxyType({"slash": "1", "heads": "none"})

    class Options(OptionSet):
        """How many lines."""

        vertical: Budget = Field(1000, description="columns of a head that the file does not name")
        slash: Budget = Field(6096, description="diagonals of a head that the file does not name")
        heads: HeadFile = Field(
            None, description='JSON file, a {head: ["vertical_and_slash", columns, diagonals, score]} for each layer'
        )

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for a file of another model."""
        assert isinstance(options, cls.Options)
        if options.heads is not None:
            check_heads(cls.name, options.heads, shape)

    def choose(self, layer: int, heads: Heads) -> Choice | None:
        """The lines of each head; None where every head has all diagonals."""
        n = len(heads)
        own = self.model.ranks.own_heads(range(self.model.whole.heads))
        columns, offsets = zip(*(self._lines(layer, head, n) for head in own), strict=True)
        if min(offsets) == n:
            return None
        attention = last_attention(heads.q[-_LAST:], heads.k)
        return vertical_slash(
            _best_columns(_first_stay(attention.sum(1), _COLUMNS), columns),
            _best_offsets(_first_stay(offset_sums(attention), _OFFSETS), offsets),
            max(offsets),
        )

    def _lines(self, layer: int, head: int, n: int) -> tuple[int, int]:
        """How many columns and diagonals a head has in a prompt of n tokens."""
        found = self.options.heads[layer].get(head) if self.options.heads else None
        asked = (found.vertical, found.slash) if found else (self.options.vertical, self.options.slash)
        columns, offsets = (budget_tokens(count, n) for count in asked)
        return min(n, max(columns, _COLUMNS)), min(n, max(offsets, _LEAST_OFFSETS))


def _first_stay(scores: Tensor, count: int) -> Tensor:
    scores[:, :count] = torch.inf
    return scores


def _ranked(scores: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Indices from the best on, [heads, most], and which of them count."""
    order = torch.sort(scores, stable=True, dim=1, descending=True).indices[:, : max(counts)]
    rank = torch.arange(order.shape[1], device=order.device)
    return order, rank < by_head(counts, order.device).unsqueeze(1)


def _best_columns(scores: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[heads, most] int32, ascending; n where a head has fewer."""
    order, stays = _ranked(scores, counts)
    return torch.where(stays, order, scores.shape[1]).sort(1).values.int()


def _best_offsets(scores: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[heads, n] bool."""
    order, stays = _ranked(scores, counts)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, stays)
