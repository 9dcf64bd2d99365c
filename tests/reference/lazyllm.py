"""LazyLLM: tokens leave at the pruning layers; each decode step selects anew and may bring them back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Twin, best, default_layers, positions_of, probabilities, tokens_of


@dataclass(frozen=True)
class LazyOptions:
    """The options of `lazyllm`, by the same names."""

    keep: tuple[int | float, ...] = (0.75, 0.375, 0.25)
    layers: tuple[int, ...] | None = None
    of: str = "prompt"
    revive: bool = True


class LazyTwin(Twin):
    """The twin of `lazyllm`.

    Attributes:
        aux: layer -> position -> hidden state that would enter it, of tokens dropped before it.
        selected: positions that the current step still looks at.
        revived: tokens times layers that decode computed of the prompt.
    """

    def __init__(self, model: Any, prompt_len: int, total: int, options: LazyOptions) -> None:
        super().__init__(model, prompt_len, total)
        self.options = options
        self.keep = dict(zip(options.layers or default_layers(self.depth), options.keep, strict=True))
        self.aux: dict[int, dict[int, Tensor]] = {layer: {} for layer in self.keep}
        self.selected: set[int] = set()
        self.revived = 0

    def step(self, positions: Tensor, ids: Tensor) -> None:
        self.selected = set(range(int(positions[-1]) + 1))
        super().step(positions, ids)

    def selects(self) -> bool:
        """Whether this step drops and revives."""
        return self.options.revive or not self.decoding

    def enter(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the selected tokens that this layer has never computed."""
        if not self.decoding or not self.options.revive:
            return hidden, positions
        rows = dict(zip(positions.tolist(), hidden, strict=True))
        have = positions_of(self.held[layer].any(1))
        for position in self.selected - have - set(rows):
            rows[position] = self.aux[layer].pop(position)
        order = sorted(rows)
        self.revived += sum(position < self.prompt_len for position in order)
        return torch.stack([rows[position] for position in order]), torch.tensor(order)

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        mask = self.causal(layer, positions)
        if not self.selects():
            return mask
        chosen = torch.tensor([position in self.selected for position in range(self.total)])
        return mask & chosen

    def leave(self, layer: int, hidden: Tensor, positions: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if layer + 1 not in self.keep or not self.selects():
            return hidden, positions
        self.selected = self.top(layer, positions, q)
        kept = []
        for row, position in enumerate(positions.tolist()):
            if position in self.selected:
                kept.append(row)
            else:
                self.aux[layer + 1][position] = hidden[row]
        return hidden[kept], positions[kept]

    def top(self, layer: int, positions: Tensor, q: Tensor) -> set[int]:
        """The newest token and those it looks at most."""
        selected, newest = sorted(self.selected), int(positions[-1])
        length = len(selected) if self.options.of == "survivors" else newest + 1
        count = tokens_of(self.keep[layer + 1], length)
        weights = probabilities(q[-1:], self.keys[layer][selected], torch.ones(1, len(selected), dtype=torch.bool))
        scores = weights[:, 0].mean(0).tolist()
        scores[selected.index(newest)] = math.inf
        return {selected[index] for index in best(scores, count)}
