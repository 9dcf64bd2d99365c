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

    def __init__(self, angles: Any) -> None:
        """
        Args:
            angles: the model's rotary module: (x, position_ids [1, n]) -> cos, sin, each [1, n, d].
        """
        self._angles = angles
        self._positions: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates x, [n, heads, d], to `positions`, [n] int64."""
        if positions is not self._positions:
            cos, sin = self._angles(x, positions.unsqueeze(0))
            self._cos, self._sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
            self._positions = positions
        return (x * self._cos) + (_half_turn(x) * self._sin)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
