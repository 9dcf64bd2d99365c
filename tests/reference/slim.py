"""SlimInfer: blocks of prompt tokens leave at the pruning layers; decode may change the set at the layer before one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Twin, best, chunks, default_layers, tokens_of


@dataclass(frozen=True)
class SlimOptions:
    """The options of `slim`, by the same names."""

    budgets: tuple[int | float, ...] = (0.75, 0.375, 0.25)
    layers: tuple[int, ...] | None = None
    score: str = "query_peak"
    votes: int = 1
    w: int = 32
    block: int = 64
    unit: int = 8
    sink: int = 1
    tail: int = 1
    ff: str = "survivors"
    reselect: str = "C"
    gamma: float = 0.9

    def schedule(self, depth: int, prompt_len: int) -> dict[int, int]:
        """Layer that first holds a pruned set -> tokens in it."""
        least = (self.sink + self.tail) * self.block
        budgets = [max(tokens_of(budget, prompt_len), least) for budget in self.budgets]
        return dict(zip(self.layers or default_layers(depth), budgets, strict=True))


class SlimTwin(Twin):
    """The twin of `slim`.

    Attributes:
        blocks: of the rows that entered a layer behind which pruning happened, as lists of positions.
        active: the blocks among them that this layer's decode attends to.
        swaps: how often decode changed an active set.
    """

    def __init__(self, model: Any, prompt_len: int, total: int, options: SlimOptions) -> None:
        super().__init__(model, prompt_len, total)
        self.options, self.budget = options, options.schedule(self.depth, prompt_len)
        self.blocks: dict[int, list[list[int]]] = {}
        self.active: dict[int, set[int]] = {}
        self.swaps = 0
        self.ballots: list[list[float]] = []

    def step(self, positions: Tensor, ids: Tensor) -> None:
        super().step(positions, ids)
        if self.decoding and self.options.reselect == "C":
            self.trace.held[-1] = [self.ready(layer, held) for layer, held in enumerate(self.trace.held[-1])]

    def ready(self, layer: int, held: set[int]) -> set[int]:
        """What the next token will find."""
        if layer not in self.active:
            return held
        there = {position for block in self.active[layer] for position in self.blocks[layer][block]}
        return {position for position in held if position in there or position >= self.prompt_len}

    def leave(self, layer: int, hidden: Tensor, positions: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        first = min((first for first in self.budget if first > layer), default=self.depth + self.options.votes)
        if self.decoding or first - layer > self.options.votes or self.budget[first] >= len(positions):
            return hidden, positions
        self.blocks[layer] = chunks(positions.tolist(), self.options.block)
        self.ballots.append(self.prefill_scores(layer, q))
        if layer + 1 < first:
            del self.blocks[layer]
            return hidden, positions
        self.active[layer] = self.choose(layer, [sum(block) / len(block) for block in zip(*self.ballots, strict=True)])
        self.ballots.clear()
        kept = {position for block in self.active[layer] for position in self.blocks[layer][block]}
        rows = [row for row, position in enumerate(positions.tolist()) if position in kept]
        return hidden[rows], positions[rows]

    def choose(self, layer: int, scores: list[float]) -> set[int]:
        """Forced blocks, and the best of the others until one more would not fit."""
        blocks, size = self.blocks[layer], self.options.block
        missing = len(blocks) * size - sum(len(block) for block in blocks)
        count = (self.budget[layer + 1] + missing) // size
        forced = set(range(self.options.sink)) | set(range(len(blocks) - self.options.tail, len(blocks)))
        lifted = [math.inf if block in forced else score for block, score in enumerate(scores)]
        return best(lifted, count)

    def prefill_scores(self, layer: int, q: Tensor) -> list[float]:
        """One a block."""
        if self.options.score in ("token_softmax", "query_peak"):
            return self.by_tokens(layer, q)
        return self.by_units(layer, q[self.raters(layer)].mean(0), self.options.score)

    def raters(self, layer: int) -> list[int]:
        """Rows of the prompt's last w tokens, as far as they came to this layer."""
        positions = [position for block in self.blocks[layer] for position in block]
        return [row for row, position in enumerate(positions) if position >= self.prompt_len - self.options.w]

    def by_tokens(self, layer: int, q: Tensor) -> list[float]:
        """Attention that the last w rows that are left pay, on average or the keenest, to the best unit of a block."""
        positions = [position for block in self.blocks[layer] for position in block]
        keys, group = self.keys[layer][positions], self.decoder.heads // self.decoder.kv_heads
        rows = self.raters(layer)
        each = torch.zeros(self.decoder.heads, len(rows), len(positions))
        for at, row in enumerate(rows):
            for head in range(self.decoder.heads):
                logits = keys[: row + 1, head // group] @ q[row, head] / math.sqrt(self.decoder.d)
                each[head, at, : row + 1] = torch.softmax(logits, dim=0)
        paid = (each.amax(1) if self.options.score == "query_peak" else each.mean(1)).mean(0)
        of = dict(zip(positions, paid.tolist(), strict=True))
        return [
            max(sum(of[position] for position in unit) for unit in chunks(block, self.options.unit))
            for block in self.blocks[layer]
        ]

    def by_units(self, layer: int, q: Tensor, score: str) -> list[float]:
        """Relevance of the best unit of each block for one query, [heads, d], by the units' mean keys."""
        units = [chunks(block, self.options.unit) for block in self.blocks[layer]]
        group = self.decoder.heads // self.decoder.kv_heads
        means = torch.stack([self.keys[layer][unit].mean(0) for block in units for unit in block])
        relevance = torch.zeros(len(means))
        for head in range(self.decoder.heads):
            dots = means[:, head // group] @ q[head]
            scaled = torch.softmax(dots / math.sqrt(self.decoder.d), dim=0)
            relevance += (dots.abs() if score == "absdot" else scaled) / self.decoder.heads
        left = relevance.tolist()
        return [max(left.pop(0) for _ in block) for block in units]

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        mask = self.causal(layer, positions)
        if not self.decoding or layer not in self.active or self.options.reselect != "C":
            return mask
        allowed = torch.arange(self.total) >= self.prompt_len
        for block in self.active[layer]:
            allowed[self.blocks[layer][block]] = True
        # What this token wants is there for the next one.
        self.reselect(layer, q[-1])
        return mask & allowed

    def reselect(self, layer: int, q: Tensor) -> None:
        """Takes the newest query's blocks over where they differ enough from the active ones."""
        candidates = self.choose(layer, self.by_units(layer, q, "softmax"))
        overlap = len(candidates & self.active[layer]) / len(candidates)
        if overlap < self.options.gamma:
            self.active[layer] = candidates
            self.swaps += 1
