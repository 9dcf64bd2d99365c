"""Methods that cut once: FastKV and GemFilter the prompt, DuoAttention what a KV head still sees, KVzip the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.eviction import BudgetOptions, EvictionTwin, pooled
from tests.reference.model import Decoder, Trace, Twin, best, mix, positions_of, probabilities


@dataclass(frozen=True)
class FastOptions:
    """FastKV's options; shares are of the prompt, and a whole number of `kept` is tokens in every layer."""

    cut: int = 15
    rows: float = 0.2
    kept: float | int = 0.1
    window: int = 8
    kernel: int = 7
    pool: str = "max"


class FastTwin(EvictionTwin):
    """Behind layer `cut` only the rows go on that its last ones look at; every layer keeps a part of its tokens.

    Attributes:
        rows: the prompt's positions that each layer computes.
        scores_of: layer -> what its tokens before the window are worth, [kv_heads, tokens].
    """

    def __init__(self, model: Any, prompt_len: int, total: int, options: FastOptions) -> None:
        super().__init__(model, prompt_len, total, BudgetOptions())
        self.options = options
        self.rows: list[list[int]] = []
        self.scores_of: dict[int, Tensor] = {}

    def kept_of(self, layer: int, rows: int) -> int:
        """Tokens that each KV head keeps of those rows, the window among them."""
        if isinstance(self.options.kept, int):
            return max(self.options.kept, self.options.window)
        share = self.options.kept / (self.options.rows if layer > self.options.cut else 1)
        return max(int(share * rows), self.options.window)

    def attend(self, layer: int, raw_q: Tensor, q: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        if not self.decoding:
            self.rows.append(positions.tolist())
            self.keep(layer, q, positions)
        return Twin.attend(self, layer, raw_q, q, positions, mask)

    def keep(self, layer: int, q: Tensor, positions: Tensor) -> None:
        """Forgets the rest, for decode; the mask of the prefill is made already."""
        rows = len(positions)
        count = self.kept_of(layer, rows)
        if rows > self.options.window and rows >= count:
            self.scores_of[layer] = self.worth(q, self.keys[layer, positions])
            kept = [self.best_and_window(row, count) for row in self.scores_of[layer]]
            self.forget(layer, [set(positions[head].tolist()) for head in kept])

    def worth(self, q: Tensor, keys: Tensor) -> Tensor:
        """Attention of the window's rows, summed, pooled, and then summed over the group."""
        past = len(q) - self.options.window
        total = torch.zeros(self.decoder.kv_heads, past)
        for head in range(self.decoder.heads):
            paid = torch.zeros(len(q))
            for row in range(past, len(q)):
                logits = keys[: row + 1, head // self.group] @ q[row, head] / math.sqrt(self.decoder.d)
                paid[: row + 1] += torch.softmax(logits, dim=0)
            total[head // self.group] += pooled(paid[:past], self.options.kernel, self.options.pool)
        return total

    def best_and_window(self, scores: Tensor, count: int) -> list[int]:
        """So many rows, ascending."""
        past, window = len(scores), self.options.window
        return [*sorted(best(scores.tolist(), count - window)), *range(past, past + window)]

    def leave(self, layer: int, hidden: Tensor, positions: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        count = max(int(self.options.rows * self.prompt_len), self.options.window)
        if self.decoding or layer != self.options.cut or layer not in self.scores_of or len(positions) <= count:
            return hidden, positions
        chosen = self.best_and_window(self.scores_of[layer].sum(0), count)
        return hidden[chosen], positions[chosen]


def prefill(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's rotated queries and keys of a dense prefill, [n, heads, d] and [n, kv_heads, d]."""
    return [(q, k) for q, k, _ in with_values(model, ids)]


@torch.no_grad()
def with_values(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same and the values, [n, kv_heads, d]."""
    decoder, n, heads = Decoder(model), len(ids), []
    hidden, causal = decoder.embed(ids), torch.ones(n, n, dtype=torch.bool).tril()
    for layer in range(decoder.depth):
        q, k, v = decoder.project(layer, hidden)
        q, k = decoder.rotate(q, torch.arange(n)), decoder.rotate(k, torch.arange(n))
        heads.append((q, k, v))
        hidden = decoder.finish(layer, hidden, mix(probabilities(q, k, causal), v))
    return heads


@dataclass(frozen=True)
class GemOptions:
    """GemFilter's options."""

    layer: int = 13
    kept: int = 1024
    kernel: int = 5


def gem_positions(q: Tensor, k: Tensor, options: GemOptions) -> list[int]:
    """The prompt's positions that the last row's bare products choose in the filter layer, ascending."""
    group = q.shape[1] // k.shape[1]
    products = [k[:, head // group] @ query for head, query in enumerate(q[-1])]
    scores = pooled(torch.stack(products).sum(0), options.kernel, "avg")
    return sorted(best(scores.tolist(), options.kept))


def gem_ids(model: Any, ids: Tensor, options: GemOptions) -> Tensor:
    """The shorter prompt."""
    return ids[gem_positions(*prefill(model, ids)[options.layer], options)]


def gem(model: Any, ids: Tensor, prompt_len: int, options: GemOptions) -> Trace:
    """The chosen tokens as a prompt of their own, counted from 0, and the rest of `ids` behind them."""
    chosen = gem_ids(model, ids[:prompt_len], options)
    request = torch.cat((chosen, ids[prompt_len:]))
    return Twin(model, len(chosen), len(request)).run(request)


def full_heads(gates: Tensor, sparsity: float) -> Tensor:
    """Which KV heads see everything, by their gates: [layers, kv_heads] -> the same, bool."""
    clipped = gates.double().clip(0, 1)
    return clipped >= torch.quantile(clipped.flatten(), sparsity)


class DuoTwin(EvictionTwin):
    """DuoAttention: behind every step, the heads that are not full forget all but sinks and the most recent tokens.

    Attributes:
        seen: by step, layer and KV head: the positions that the step's last row attended to.
    """

    def __init__(self, model: Any, prompt_len: int, total: int, full: Tensor, sinks: int, recent: int) -> None:
        """`full` is [layers, kv_heads] bool."""
        super().__init__(model, prompt_len, total, BudgetOptions())
        self.full, self.sinks, self.recent = full, sinks, recent
        self.seen: list[list[list[set[int]]]] = []

    def step(self, positions: Tensor, ids: Tensor) -> None:
        self.seen.append([])
        super().step(positions, ids)

    def attend(self, layer: int, raw_q: Tensor, q: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        heads = [positions_of(head) for head in self.held[layer].T]
        self.seen[-1].append(heads)
        end = int(positions[-1]) + 1
        kept = {*range(min(self.sinks, end)), *range(max(end - self.recent, 0), end)}
        self.forget(layer, [head if self.full[layer, index] else head & kept for index, head in enumerate(heads)])
        return Twin.attend(self, layer, raw_q, q, positions, mask)


def zip_scores(q: Tensor, sinks: Tensor, chunk: Tensor, repeat: Tensor, adds: Tensor | None = None) -> Tensor:
    """KVzip: the most that any row which repeats a chunk looks at each of its tokens.

    Args:
        q: the repeating rows', [m, heads, d].
        sinks, chunk: cached keys, [tokens, kv_heads, d].
        repeat: the repeating rows', [m, kv_heads, d].
        adds: what attention to a token counts, [heads, tokens of the chunk]; 1 if not given.

    Returns:
        [kv_heads, tokens of the chunk].
    """
    before, group = torch.cat((sinks, chunk)), q.shape[1] // repeat.shape[1]
    scores = torch.zeros(repeat.shape[1], len(chunk))
    for head in range(q.shape[1]):
        for row in range(len(q)):
            keys = torch.cat((before, repeat[: row + 1]))[:, head // group].float()
            weights = torch.softmax(keys @ q[row, head].float() / math.sqrt(q.shape[2]), dim=0)
            paid = weights[len(sinks) : len(before)] * (1 if adds is None else adds[head])
            scores[head // group] = torch.maximum(scores[head // group], paid)
    return scores


@torch.no_grad()
def zip_adds(model: Any, layer: int, values: Tensor) -> Tensor:
    """KVzip+: how long the vector is that a value, [n, kv_heads, d], adds through each query head: [heads, n]."""
    projection, (_, kv_heads, d) = model.model.layers[layer].self_attn.o_proj.weight, values.shape
    heads = projection.shape[1] // d
    added = [values[:, head * kv_heads // heads] @ projection[:, head * d : (head + 1) * d].T for head in range(heads)]
    return torch.stack([rows.square().sum(1).sqrt() for rows in added])


def zip_table(model: Any, ids: Tensor, repeats: list[tuple[range, Tensor]], sinks: int, plus: bool = False) -> Tensor:
    """Scores of a whole context, [layers, kv_heads, tokens]; sinks have 1.

    Args:
        model: a checkpoint of transformers.
        ids: the context.
        repeats: chunks of positions, and the ids that are fed behind the context to have each repeated.
        sinks: tokens that stay.
        plus: KVzip+.
    """
    layers: list[Tensor] = []
    for chunk, more in repeats:
        for layer, (q, k, v) in enumerate(with_values(model, torch.cat((ids, more)))):
            if len(layers) == layer:
                layers.append(torch.ones(k.shape[1], len(ids)))
            places = [position for position in chunk if position >= sinks]
            adds = zip_adds(model, layer, v[places]) if plus else None
            scores = zip_scores(q[len(ids) :], k[:sinks], k[places], k[len(ids) :], adds)
            layers[layer][:, places] = scores
    return torch.stack(layers)


def zip_keeps(table: Tensor, share: float) -> Tensor:
    """The best of all layers, heads and tokens jointly, [layers, kv_heads, tokens] -> the same, bool."""
    kept = torch.zeros(table.numel(), dtype=torch.bool)
    kept[sorted(best(table.flatten().tolist(), int(share * table.numel())))] = True
    return kept.view(table.shape)
