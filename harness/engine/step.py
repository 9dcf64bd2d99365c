"""The hidden states on their way through the layers, and what one layer projects from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.engine.hardware import kernels_run


@dataclass(frozen=True)
class Rows:
    """Tokens in flight.

    Attributes:
        hidden: residual stream, [n, hidden].
        positions: the tokens' places in the original sequence, [n] int64, strictly ascending. Dropping rows never
            renumbers the rest.
        attended: output of this layer's attention, [n, heads * head_dim], not yet projected or added to `hidden`;
            present from `attend` to the feed forward only.
    """

    hidden: Tensor
    positions: Tensor
    attended: Tensor | None = None

    def __len__(self) -> int:
        return self.positions.shape[0]

    def select(self, index: Tensor) -> Rows:
        """The rows at `index` ([m] int64, ascending), everything they carry included; one launch where kernels run."""
        if kernels_run(index.device):
            from harness.engine.kernels.take_rows import take_rows

            return Rows(*take_rows(self.hidden, self.positions, self.attended, index))
        attended = None if self.attended is None else self.attended.index_select(0, index)
        return Rows(self.hidden.index_select(0, index), self.positions.index_select(0, index), attended)

    def single(self) -> Iterator[Rows]:
        """The rows one by one, for hooks that see one request each."""
        for row in range(len(self)):
            at = slice(row, row + 1)
            attended = None if self.attended is None else self.attended[at]
            yield Rows(self.hidden[at], self.positions[at], attended)

    def merged(self, other: Rows | None) -> Rows:
        """These rows and others between layers, in the order of their positions."""
        if other is None:
            return self
        positions, order = torch.cat((self.positions, other.positions)).sort()
        return Rows(torch.cat((self.hidden, other.hidden))[order], positions)

    def with_attended(self, attended: Tensor) -> Rows:
        """The same rows, carrying their attention output."""
        return replace(self, attended=attended)


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one layer's rows: normed, projected and rotated, just as its attention uses them.

    Attributes:
        q: [n, heads, head_dim].
        k: [n, kv_heads, head_dim].
        v: [n, kv_heads, head_dim].
        positions: [n], the rows' original positions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return self.positions.shape[0]

    def single(self) -> Iterator[Heads]:
        """The rows one by one, for methods that decide anew for each token."""
        for row in range(len(self)):
            at = slice(row, row + 1)
            yield Heads(self.q[at], self.k[at], self.v[at], self.positions[at])


@dataclass(frozen=True)
class Step:
    """Where in the request the engine is.

    Attributes:
        phase: "prefill" brings the prompt in; "decode" brings in tokens after it (one a step while generating, several
            where a question follows a pruned context); "probe" reads tokens behind the prompt that are to leave nothing
            (`Method.probes`).
        start: position of the first token that this step brings in.
        count: how many tokens it brings in.
    """

    phase: Literal["prefill", "decode", "probe"]
    start: int
    count: int
