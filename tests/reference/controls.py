"""Controls: slim's schedule with other blocks, and a prompt cut in the middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Twin
from tests.reference.slim import SlimOptions, SlimTwin


class RecentTwin(SlimTwin):
    """The twin of `recent`."""

    def prefill_scores(self, layer: int, q: Tensor) -> list[float]:
        return [float(block) for block in range(len(self.blocks[layer]))]


class GivenTwin(Twin):
    """Attention among rows that someone else chose: prompt positions a layer."""

    def __init__(self, model: Any, prompt_len: int, total: int, kept: list[set[int]]) -> None:
        super().__init__(model, prompt_len, total)
        self.kept = kept

    def enter(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.decoding:
            return hidden, positions
        rows = [row for row, position in enumerate(positions.tolist()) if position in self.kept[layer]]
        return hidden[rows], positions[rows]


def truncated(ids: Tensor, depth: int, options: SlimOptions) -> Tensor:
    """Head and tail of the prompt, as many tokens as slim asks for in a layer on average."""
    running, asked = len(ids), []
    schedule = options.schedule(depth, len(ids))
    for layer in range(depth):
        running = min(running, schedule.get(layer, running))
        asked.append(running)
    keep = sum(asked) // depth
    return torch.cat((ids[: keep - keep // 2], ids[len(ids) - keep // 2 :]))
