"""Methods that keep fewer keys and values: dense attention first, then every KV head forgets tokens of its own.

A score is a table over the prompt, [kv_heads, prompt tokens]; of equal scores the lower position's wins. Tokens that
stay whatever their score have an infinite one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Twin, best, chunks, positions_of, probabilities, tokens_of


@dataclass(frozen=True)
class BudgetOptions:
    """The options of `knorm`, by the same names."""

    budget: int | float = 0.25


class EvictionTwin(Twin):
    """Prunes once, behind a layer's prefill, to the budget's best tokens; the others override `scores` or `keeps`."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: BudgetOptions, protected: int = 0) -> None:
        """`protected` counts tokens that stay even where the budget is smaller."""
        super().__init__(model, prompt_len, total)
        self.budget = max(tokens_of(options.budget, prompt_len), min(protected, prompt_len))
        self.group = self.decoder.heads // self.decoder.kv_heads

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        """[heads, n, total]: each query head sees what its KV head holds of its row and the tokens before it."""
        held = self.held[layer].T.repeat_interleave(self.group, dim=0)
        return held[:, None] & (torch.arange(self.total) <= positions[:, None])

    def attend(self, layer: int, raw_q: Tensor, q: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        attended = super().attend(layer, raw_q, q, positions, mask)
        if not self.decoding and self.budget < self.prompt_len:
            self.forget(layer, self.keeps(layer, raw_q, q))
        return attended

    def forget(self, layer: int, kept: list[set[int]]) -> None:
        """All that the KV heads do not keep."""
        for head, positions in enumerate(kept):
            there = torch.tensor([position in positions for position in range(self.total)])
            self.held[layer, :, head] &= there

    def keeps(self, layer: int, raw_q: Tensor, q: Tensor) -> list[set[int]]:
        """Positions for each KV head.

        Args:
            layer: where.
            raw_q, q: the prompt's queries before and after the rotation, [n, heads, d].
        """
        return [best(row.tolist(), self.count(layer)) for row in self.scores(layer, raw_q, q)]

    def count(self, layer: int) -> int:
        """Tokens that each KV head of the layer keeps."""
        return self.budget

    def scores(self, layer: int, raw_q: Tensor, q: Tensor) -> Tensor:
        """[kv_heads, n]."""
        raise NotImplementedError

    def paid(self, layer: int, q: Tensor, rows: range) -> Tensor:
        """Attention that those rows pay to each token, summed over them, mean over the group: [kv_heads, n]."""
        sums = torch.zeros(self.decoder.kv_heads, len(q))
        for head in range(self.decoder.heads):
            of = head // self.group
            for row in rows:
                logits = self.keys[layer][: row + 1, of] @ q[row, head] / math.sqrt(self.decoder.d)
                sums[of, : row + 1] += torch.softmax(logits, dim=0) / self.group
        return sums


@dataclass(frozen=True)
class SnapOptions(BudgetOptions):
    """The options of `snapkv`, by the same names."""

    window: int = 32
    kernel: int = 5
    pool: str = "avg"


class SnapTwin(EvictionTwin):
    """The twin of `snapkv`."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: SnapOptions) -> None:
        super().__init__(model, prompt_len, total, options, options.window)
        self.kernel, self.pool = options.kernel, options.pool
        self.window = min(options.window, prompt_len)
        self.past = prompt_len - self.window

    def scores(self, layer: int, raw_q: Tensor, q: Tensor) -> Tensor:
        window = torch.full((self.decoder.kv_heads, self.window), math.inf)
        return torch.cat((self.past_scores(layer, q), window), dim=1)

    def past_scores(self, layer: int, q: Tensor) -> Tensor:
        """[kv_heads, tokens before the window]: means over the window's rows, which rank tokens as sums do."""
        sums = self.paid(layer, q, range(self.past, self.prompt_len))[:, : self.past]
        return torch.stack([pooled(row / self.window, self.kernel, self.pool) for row in sums])


def pooled(row: Tensor, kernel: int, how: str) -> Tensor:
    """Mean or maximum of the `kernel` scores around each, [n]; a mean counts zeros beyond the ends."""
    beyond = row.new_full((kernel // 2,), 0 if how == "avg" else -math.inf)
    padded = torch.cat((beyond, row, beyond))
    around = [padded[index : index + kernel] for index in range(len(row))]
    return torch.stack([some.sum() / kernel if how == "avg" else some.max() for some in around])


@dataclass(frozen=True)
class PyramidOptions(SnapOptions):
    """The options of `pyramidkv`, by the same names."""

    beta: int = 20


class PyramidTwin(SnapTwin):
    """The twin of `pyramidkv`: SnapKV with more tokens in the lower layers."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: PyramidOptions) -> None:
        super().__init__(model, prompt_len, total, options)
        self.counts = pyramid(self.budget - self.window, self.past, options.beta, self.depth)
        if prompt_len < 2 * (self.budget - self.window):
            self.counts = [self.budget - self.window] * self.depth

    def count(self, layer: int) -> int:
        return self.counts[layer] + self.window


def pyramid(mean: int, past: int, beta: int, depth: int) -> list[int]:
    """Tokens before the window for each layer, `mean` on average, never more than the `past` ones there are."""
    least = mean // beta
    most = 2 * mean - least
    if most >= past:
        most, least = past, 2 * mean - past
    return [most - layer * ((most - least) // (depth - 1)) for layer in range(depth)]


@dataclass(frozen=True)
class AdaOptions(SnapOptions):
    """The options of `adakv`, by the same names."""

    kernel: int = 7
    pool: str = "max"
    alpha: float = 0.2


class AdaTwin(SnapTwin):
    """The twin of `adakv`: the KV heads of a layer share one budget, each by how high its scores are."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: AdaOptions) -> None:
        super().__init__(model, prompt_len, total, options)
        self.alpha = options.alpha

    def keeps(self, layer: int, raw_q: Tensor, q: Tensor) -> list[set[int]]:
        scores = self.past_scores(layer, q).tolist()
        window = set(range(self.past, self.prompt_len))
        return [best(row, count) | window for row, count in zip(scores, self.shares(scores), strict=True)]

    def shares(self, scores: list[list[float]]) -> list[int]:
        """How many tokens before the window each KV head keeps."""
        each = self.budget - self.window
        ranked = sorted(
            (-score, position, head) for head, row in enumerate(scores) for position, score in enumerate(row)
        )
        winners = [head for _, _, head in ranked[: each * len(scores)]]
        least = int(self.alpha * each)
        return [round(winners.count(head) * (1 - self.alpha) + least) for head in range(len(scores))]


@dataclass(frozen=True)
class H2OOptions(BudgetOptions):
    """The options of `h2o`, by the same names."""

    mode: str = "port"
    window: int = 32

    def recent(self, budget: int) -> int:
        """How many of the budget's tokens are the newest ones."""
        return self.window or budget // 2


class H2OTwin(EvictionTwin):
    """The twin of `h2o`: what all rows of the prompt look at, and a window."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: H2OOptions) -> None:
        super().__init__(model, prompt_len, total, options, options.window)
        self.window = options.recent(self.budget)

    def scores(self, layer: int, raw_q: Tensor, q: Tensor) -> Tensor:
        scores = self.paid(layer, q, range(self.prompt_len))
        scores[:, self.prompt_len - self.window :] = math.inf
        return scores


class RollingTwin(EvictionTwin):
    """Forgets behind every step, the whole prompt being one, what a KV head holds above the budget."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: BudgetOptions, protected: int = 0) -> None:
        super().__init__(model, prompt_len, total, options, protected)
        if isinstance(options.budget, int):
            self.budget = options.budget
        elif options.budget == 1:
            self.budget = total
        self.budget = max(self.budget, protected)

    def attend(self, layer: int, raw_q: Tensor, q: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        attended = Twin.attend(self, layer, raw_q, q, positions, mask)
        self.look(layer, probabilities(q, self.keys[layer], mask))
        held = [sorted(positions_of(head)) for head in self.held[layer].T]
        if len(held[0]) > self.budget:
            self.forget(layer, [self.keeps_of(layer, head, tokens) for head, tokens in enumerate(held)])
        return attended

    def look(self, layer: int, weights: Tensor) -> None:
        """Learns from a step's attention, [heads, n, total]."""
        raise NotImplementedError

    def keeps_of(self, layer: int, head: int, held: list[int]) -> set[int]:
        """Which of the positions that it holds, ascending, a KV head keeps."""
        raise NotImplementedError


class H2ODropTwin(RollingTwin):
    """The twin of `h2o:mode=drop`: what all rows so far looked at, and a window that moves along."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: H2OOptions) -> None:
        super().__init__(model, prompt_len, total, options, options.window)
        self.recent = options.recent(self.budget)
        self.paid_so_far = torch.zeros(self.depth, self.decoder.kv_heads, total)

    def look(self, layer: int, weights: Tensor) -> None:
        for head, rows in enumerate(weights):
            self.paid_so_far[layer, head // self.group] += rows.sum(0) / self.group

    def keeps_of(self, layer: int, head: int, held: list[int]) -> set[int]:
        older, newest = held[: len(held) - self.recent], held[len(held) - self.recent :]
        scores = [float(self.paid_so_far[layer, head, position]) for position in older]
        return {older[index] for index in best(scores, self.budget - self.recent)} | set(newest)


class TovaTwin(RollingTwin):
    """The twin of `tova`: what the newest row looks at, by all heads alike."""

    def look(self, layer: int, weights: Tensor) -> None:
        self.newest = weights[:, -1].mean(0)

    def keeps_of(self, layer: int, head: int, held: list[int]) -> set[int]:
        return {held[index] for index in best(self.newest[held].tolist(), self.budget)}


@dataclass(frozen=True)
class ExpectedOptions(BudgetOptions):
    """The options of `expected`, by the same names, and whether values count."""

    sinks: int = 4
    future: int = 512
    vnorm: bool = True


class ExpectedTwin(EvictionTwin):
    """The twin of `expected`: what queries to come will look at if they are spread as the prompt's are."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: ExpectedOptions) -> None:
        super().__init__(model, prompt_len, total, options, options.sinks)
        self.options = options
        turns = [self.turn(prompt_len + ahead) for ahead in range(options.future)]
        self.mean_turn = sum(turns, torch.zeros(self.decoder.d, self.decoder.d)) / options.future

    def turn(self, position: int) -> Tensor:
        """The rotation of that position as a matrix, [d, d]."""
        channels = torch.eye(self.decoder.d)[:, None]
        return self.decoder.rotate(channels, torch.full((self.decoder.d,), position))[:, 0].T

    def scores(self, layer: int, raw_q: Tensor, q: Tensor) -> Tensor:
        sinks, scores = self.options.sinks, torch.zeros(self.decoder.kv_heads, self.prompt_len)
        for head in range(self.decoder.heads):
            keys = self.keys[layer][sinks : self.prompt_len, head // self.group]
            scores[head // self.group, sinks:] += self.expected(raw_q[sinks:, head], keys) / self.group
        if self.options.vnorm:
            scores *= torch.linalg.vector_norm(self.values[layer][: self.prompt_len], dim=-1).T
        scores[:, :sinks] = math.inf
        return scores

    def expected(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention of normally distributed queries, from the mean and covariance of `queries`, [n, d], to keys [n]."""
        mean, d = queries.mean(0), self.decoder.d
        covariance = sum((torch.outer(query - mean, query - mean) for query in queries), torch.zeros(d, d))
        mean, covariance = self.mean_turn @ mean, self.mean_turn @ (covariance / len(queries)) @ self.mean_turn.T
        logits = [mean @ key / math.sqrt(d) + key @ covariance @ key / (2 * d) for key in keys]
        return torch.softmax(torch.stack(logits), dim=0)


@dataclass(frozen=True)
class KeyDiffOptions(BudgetOptions):
    """The options of `keydiff`, by the same names."""

    block: int = 128


class KeyDiffTwin(EvictionTwin):
    """The twin of `keydiff`: keys unlike the mean direction stay, block by block, or all in one go with blocks of 0."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: KeyDiffOptions) -> None:
        super().__init__(model, prompt_len, total, options)
        rest = range(self.budget, prompt_len)
        self.blocks = chunks(rest, options.block) if options.block else [list(rest)]

    def keeps(self, layer: int, raw_q: Tensor, q: Tensor) -> list[set[int]]:
        return [self.keeps_of(self.keys[layer][:, head]) for head in range(self.decoder.kv_heads)]

    def keeps_of(self, keys: Tensor) -> set[int]:
        kept = list(range(self.budget))
        for block in self.blocks:
            tokens = kept + block
            kept = [tokens[index] for index in sorted(best(unlike(keys[tokens]), self.budget))]
        return set(kept)


def unlike(keys: Tensor) -> list[float]:
    """Minus the cosine between each key, [n, d], and the mean of all directions."""
    directions = [key / torch.linalg.vector_norm(key) for key in keys]
    anchor = sum(directions, torch.zeros(keys.shape[1])) / len(keys)
    return [-float(direction @ anchor / torch.linalg.vector_norm(anchor)) for direction in directions]


class KnormTwin(EvictionTwin):
    """The twin of `knorm`: small keys stay."""

    def scores(self, layer: int, raw_q: Tensor, q: Tensor) -> Tensor:
        keys = self.keys[layer][: self.prompt_len]
        return torch.stack([-torch.linalg.vector_norm(keys[:, head], dim=1) for head in range(keys.shape[1])])


class CriticalTwin(EvictionTwin):
    """The twin of `criticalkv`: half for the best of another method, half weighted by what values become."""

    def __init__(self, base: EvictionTwin, model: Any, prompt_len: int, total: int) -> None:
        super().__init__(model, prompt_len, total, BudgetOptions(base.budget))
        self.base, self.first = base, self.budget // 2
        base.keys, base.values = self.keys, self.values

    def scores(self, layer: int, raw_q: Tensor, q: Tensor) -> Tensor:
        scores = self.base.scores(layer, raw_q, q)
        forced = scores == math.inf
        scores[forced] = scores[~forced].max() + 1
        second = (scores + 1e-4) * self.outputs(layer)
        for head, row in enumerate(scores):
            second[head, list(best(row.tolist(), self.first))] = math.inf
        return second

    def outputs(self, layer: int) -> Tensor:
        """L1 norm of what each token's value becomes in the output projection, mean over the group: [kv_heads, n]."""
        weight, d = self.decoder.body.layers[layer].self_attn.o_proj.weight, self.decoder.d
        norms = torch.zeros(self.decoder.kv_heads, self.prompt_len)
        for head in range(self.decoder.heads):
            values = self.values[layer][: self.prompt_len, head // self.group]
            norms[head // self.group] += (values @ weight[:, head * d : (head + 1) * d].T).abs().sum(1) / self.group
        return norms
