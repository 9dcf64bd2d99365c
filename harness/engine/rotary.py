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
            module: the model's rotary module: (x, position_ids [1, n]) -> cos, sin, each [1, n, d]. It turns channel
                pairs by position times `inv_freq`, [d / 2], and scales both by `attention_scaling`.
        """
        self._module = module
        self._positions: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions` ([n] int64), each [n, d], in the dtype of `like`."""
        if positions is not self._positions:
            (self._cos, self._sin), self._positions = self._angles_at(like, positions), positions
        return self._cos, self._sin

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates x, [n, heads, d], to `positions`, [n] int64."""
        return _rotated(x, *self.angles(x, positions))

    def move(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotates x, [n, heads, d], which is rotated already, further by so many positions, [n] int64, or back."""
        cos, sin = self._angles_at(x, by)
        # Some variants (yarn) scale queries and keys with the angles, which was done once.
        scale = self._module.attention_scaling
        return _rotated(x, cos / scale, sin / scale)

    def _angles_at(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._module(like, positions.unsqueeze(0))
        return cos[0], sin[0]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos.unsqueeze(1)) + (_half_turn(x) * sin.unsqueeze(1))


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
