"""StreamingLLM: the first tokens and a window of recent ones, in its three variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Twin, mix, positions_of, probabilities, tokens_of


@dataclass(frozen=True)
class StreamingOptions:
    """The options of `streaming`, by the same names."""

    mode: str = "faithful"
    sinks: int = 4
    window: int | float = 513


class StreamingTwin(Twin):
    """The twin of `streaming`."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: StreamingOptions) -> None:
        super().__init__(model, prompt_len, total)
        self.options, self.sinks, self.window = options, options.sinks, options.window
        if isinstance(options.window, float):
            self.window = total if options.window == 1 else tokens_of(options.window, prompt_len)

    def step(self, positions: Tensor, ids: Tensor) -> None:
        super().step(positions, ids)
        if self.options.mode in ("faithful", "slide") or (self.options.mode == "evict" and not self.decoding):
            self.forget(int(positions[-1]))
        self.trace.held[-1] = [positions_of(layer.any(1)) for layer in self.held]

    def forget(self, newest: int) -> None:
        """Leaves sinks and window of the newest token in every layer."""
        self.held &= self.band(torch.tensor([newest]))[0][:, None]

    def band(self, positions: Tensor) -> Tensor:
        """[n, total]: sinks, and tokens less than a window before the row."""
        token = torch.arange(self.total)
        return (token < self.sinks) | (token > positions[:, None] - self.window)

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        mask = self.causal(layer, positions)
        dense = {"faithful": False, "evict": True, "slide": not self.decoding}
        return mask if dense[self.options.mode] else mask & self.band(positions)

    def attend(self, layer: int, raw_q: Tensor, q: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        if self.options.mode != "faithful":
            return super().attend(layer, raw_q, q, positions, mask)
        rows = [self.in_cache(layer, raw_q[row], int(positions[row]), mask[row]) for row in range(len(positions))]
        return torch.stack(rows)

    def in_cache(self, layer: int, query: Tensor, position: int, sees: Tensor) -> Tensor:
        """One query over what a rolling cache holds, rotated by places in that cache."""
        held = sees.nonzero().flatten()
        place = torch.arange(len(held))
        assert int(held[-1]) == position
        keys = self.decoder.rotate(self.raw_keys[layer][held], place)
        turned = self.decoder.rotate(query[None], place[-1:])
        weights = probabilities(turned, keys, torch.ones(1, len(held), dtype=torch.bool))
        return mix(weights, self.values[layer][held])[0]
