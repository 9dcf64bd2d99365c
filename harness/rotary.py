"""Rotary position embedding at explicit, possibly gapped, positions (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Rotates queries and keys to their tokens' original positions.

    The model's own module makes the angles, so scaled variants (llama3, linear, yarn) come out as trained. Layers share
    their rows' positions until something is dropped, so the angles of the last positions are kept.
    """

    def __init__(self, module: Any) -> None:
        """
        Args:
            module: the model's rotary module: (x, position_ids [1, n]) -> cos, sin, each [1, n, d].
        """
        self._module = module
        self._positions: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions` ([n] int64), each [n, d], in the dtype of `like`."""
        if positions is not self._positions:
            cos, sin = self._module(like, positions.unsqueeze(0))
            self._cos, self._sin, self._positions = cos[0], sin[0], positions
        return self._cos, self._sin

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates x, [n, heads, d], to `positions`, [n] int64."""
        cos, sin = (angle.unsqueeze(1) for angle in self.angles(x, positions))
        return (x * cos) + (_half_turn(x) * sin)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
