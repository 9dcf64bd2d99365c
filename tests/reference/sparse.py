"""Sparse prefill: the pairs of a prompt's tokens that each query head attends to, as dense truth tables.

A pattern takes queries [n, heads, d] and keys [n, kv_heads, d], both rotated, and gives a mask [heads, n, n] bool:
whether the row attends to the column. Of equal scores the first wins: the lower column, offset or block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.model import best, chunks, mix, probabilities

Pairs = set[tuple[int, int]]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention where the mask, [heads, n, n], allows it: [n, heads * d] float32."""
    return mix(probabilities(q.float(), k.float(), mask), v.float())


def density(mask: Tensor) -> list[float]:
    """Pairs attended to, as a share of those that causal attention has, for each head."""
    n = mask.shape[1]
    return [int(head.sum()) / (n * (n + 1) // 2) for head in mask]


def causal(n: int) -> Tensor:
    """[n, n]: itself and what came before."""
    return torch.ones(n, n, dtype=torch.bool).tril()


def by_head(q: Tensor, k: Tensor, pattern: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A pattern of one head's queries and keys, [n, d] each, for all heads; what is not causal drops out."""
    group = q.shape[1] // k.shape[1]
    heads = [pattern(q[:, head].float(), k[:, head // group].float()) for head in range(q.shape[1])]
    return torch.stack(heads) & causal(len(q))


def ashape(q: Tensor, k: Tensor, sinks: int, window: int) -> Tensor:
    """The first tokens, and as many as the window of the newest, the row's own among them."""
    return trishape(q, k, sinks, window, 0)


def trishape(q: Tensor, k: Tensor, sinks: int, window: int, last: int) -> Tensor:
    """The same, but the prompt's last rows attend to everything."""
    n = len(q)
    mask = torch.zeros(q.shape[1], n, n, dtype=torch.bool)
    for row in range(n):
        mask[:, row, :sinks] = True
        mask[:, row, max(row + 1 - window, 0) :] = True
    mask[:, max(n - last, 0) :] = True
    return mask & causal(n)


def last_rows(q: Tensor, k: Tensor, count: int) -> Tensor:
    """Attention that one head's last rows pay, [n, d] twice -> [count, n], float64 of softmaxes in float32."""
    n = len(q)
    weights = torch.zeros(count, n, dtype=torch.float64)
    for index, row in enumerate(range(n - count, n)):
        weights[index, : row + 1] = torch.softmax(k[: row + 1] @ q[row] / math.sqrt(q.shape[1]), dim=0)
    return weights


def by_offset(weights: Tensor) -> list[float]:
    """Sums over all entries that look equally far back, of the last rows' weights [count, n]: one for 0 .. n - 1."""
    count, n = weights.shape
    return [float(weights.diagonal(n - count - offset).sum()) for offset in range(n)]


def lifted(scores: Iterable[float], forced: range) -> list[float]:
    """Infinity for what is chosen in any case."""
    return [math.inf if index in forced else score for index, score in enumerate(scores)]


SLASH = 64
"""Rows and keys of MInference's blocks, and the rows that it looks at."""


def minference(q: Tensor, k: Tensor, vertical: int, slash: int) -> Tensor:
    """Columns and diagonals that the last rows look at most; each diagonal costs a block of keys."""
    n = len(q)

    def pattern(queries: Tensor, keys: Tensor) -> Tensor:
        weights = last_rows(queries, keys, min(SLASH, n))
        columns = best(lifted(weights.sum(0).tolist(), range(30)), min(n, max(vertical, 30)))
        offsets = best(lifted(by_offset(weights), range(100)), min(n, max(slash, 50)))
        return vertical_slash(n, columns, offsets)

    return by_head(q, k, pattern)


def vertical_slash(n: int, columns: set[int], offsets: set[int]) -> Tensor:
    """[n, n], rows of a block alike."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for start in range(0, n, SLASH):
        rows = mask[start : start + SLASH]
        rows[:, sorted(columns)] = True
        for first, end in slash_ranges(offsets, start + SLASH):
            rows[:, first:end] = True
    return mask


def slash_ranges(offsets: set[int], end_of_rows: int) -> list[list[int]]:
    """First key and end of what the offsets open to the block of rows that ends there."""
    ranges: list[list[int]] = []
    for offset in sorted((offset for offset in offsets if offset < end_of_rows), reverse=True):
        end = max(end_of_rows - offset, SLASH)
        if not ranges or end > ranges[-1][1] + SLASH:
            ranges.append([end - SLASH, end])
        elif end > ranges[-1][1]:
            ranges[-1][1] += SLASH
    return ranges


@dataclass(frozen=True)
class FlexOptions:
    """FlexPrefill's options; budgets in tokens, and without a greatest one there is no upper limit."""

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int | None = None
    block: int = 128

    @property
    def least(self) -> int:
        return math.ceil(self.min_budget / self.block)

    def clamped(self, blocks: int) -> int:
        most = math.inf if self.max_budget is None else math.ceil(self.max_budget / self.block)
        return int(min(max(blocks, self.least), most))


def flexprefill(q: Tensor, k: Tensor, options: FlexOptions) -> Tensor:
    """Blocks by estimated attention between them where that can be trusted, else by columns and diagonals alone."""
    n, block = len(q), options.block
    if n <= max(2 * block, options.least * block):
        return causal(n).expand(q.shape[1], n, n)
    return by_head(q, k, lambda queries, keys: of_blocks(n, block, flex_pairs(queries, keys, options)))


def of_blocks(n: int, block: int, pairs: Pairs) -> Tensor:
    """[n, n]: all pairs of tokens of those pairs of blocks."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for row, column in pairs:
        mask[row * block : (row + 1) * block, column * block : (column + 1) * block] = True
    return mask


def flex_pairs(q: Tensor, k: Tensor, options: FlexOptions) -> Pairs:
    """Row and column of the blocks that one head computes, [n, d] twice."""
    weights = last_rows(q, k, options.block)
    vertical = weights.mean(0).tolist()
    slash = [total / options.block for total in reversed(by_offset(weights))]
    if divergence(estimated(q, k, options.block), torch.tensor(pooled(vertical, options.block)).double()) < options.tau:
        vertical_blocks = slash_blocks = options.least
        pairs = similar(q, k, options)
    else:
        vertical_blocks = options.clamped(tokens_for(vertical, options.gamma) // 128 + 1)
        slash_blocks = options.clamped(tokens_for(slash, options.gamma) // 128 + 1)
        pairs = set()
    last = math.ceil(len(q) / options.block) - 1
    columns = best(lifted(pooled(vertical, options.block), range(1)), vertical_blocks)
    diagonals = best(lifted(pooled(slash, options.block), range(last, last + 1)), slash_blocks)
    for row in range(last + 1):
        pairs |= {(row, column) for column in columns if column <= row}
        pairs |= {(row, row - (last - diagonal)) for diagonal in diagonals if last - diagonal <= row}
    return pairs


def tokens_for(shares: list[float], gamma: float) -> int:
    """The largest of them up to a sum of gamma, and one more."""
    total, count = 0.0, 1
    for share in sorted(shares, reverse=True):
        total += share
        count += total <= gamma
    return count


def pooled(shares: list[float], block: int) -> list[float]:
    """Sums over blocks from the first on; the last may be shorter."""
    return [sum(some) for some in chunks(shares, block)]


def block_means(x: Tensor, block: int) -> Tensor:
    """[n, d] -> [blocks, d] float64."""
    return torch.stack([some.double().mean(0) for some in torch.split(x, block)])


def estimated(q: Tensor, k: Tensor, block: int) -> Tensor:
    """What the last rows might look at, by mean queries and keys: [blocks]."""
    query = q[len(q) - block :].double().mean(0) / math.sqrt(q.shape[1])
    return torch.softmax(block_means(k, block) @ query, dim=0)


def divergence(p: Tensor, q: Tensor) -> float:
    """Square root of the Jensen-Shannon divergence, in nats; not a number where a share is 0."""
    mean = (p + q) / 2
    halves = [0.5 * (some * torch.log(some / mean)).sum() for some in (p, q)]
    return float(torch.sqrt(halves[0] + halves[1]))


def similar(q: Tensor, k: Tensor, options: FlexOptions) -> Pairs:
    """The pairs of blocks with most of the attention between their means; one threshold for the whole map."""
    queries, keys = block_means(q, options.block), block_means(k, options.block)
    shares: list[tuple[float, int, int]] = []
    for row, query in enumerate(queries):
        weights = torch.softmax(keys[: row + 1] @ query / math.sqrt(q.shape[1]), dim=0)
        shares += [(-share, row, column) for column, share in enumerate(weights.tolist())]
    total, pairs = 0.0, set()
    for share, row, column in sorted(shares):
        total -= share
        if total <= options.gamma * len(queries):
            pairs.add((row, column))
    return pairs


@dataclass(frozen=True)
class XOptions:
    """XAttention's options; `first_chunk` counts the tokens whose rows are chosen as upstream's first chunk is."""

    stride: int = 16
    tau: float = 0.9
    block: int = 128
    first_chunk: int = 0


def xattention(q: Tensor, k: Tensor, options: XOptions) -> Tensor:
    """Blocks by the sums of their antidiagonals, in each row the fewest that reach a share of its attention."""
    n, block = len(q), options.block

    def pattern(queries: Tensor, keys: Tensor) -> Tensor:
        pairs: Pairs = set()
        for row, mass in enumerate(block_mass(queries, keys, options.stride, block).tolist()):
            choose = choose_lagging if row * block < options.first_chunk else choose_fewest
            pairs |= {(row, column) for column in choose(mass, row, options.tau)}
        return of_blocks(n, block, pairs)

    return by_head(q, k, pattern)


def block_mass(q: Tensor, k: Tensor, stride: int, block: int) -> Tensor:
    """Attention between groups of `stride` tokens, summed over blocks: [n, d] twice -> [blocks, blocks] float64.

    The prompt ends with zeros up to a whole group; there are no groups of zeros alone.
    """
    zeros = q.new_zeros(-len(q) % stride, q.shape[1])
    queries = [some.flip(0).flatten() for some in torch.split(torch.cat((q, zeros)), stride)]
    keys = torch.stack([some.flatten() for some in torch.split(torch.cat((k, zeros)), stride)])
    blocks, each = math.ceil(len(q) / block), block // stride
    mass = torch.zeros(blocks, blocks, dtype=torch.float64)
    for row, query in enumerate(queries):
        weights = torch.softmax(keys[: row + 1] @ query / (math.sqrt(q.shape[1]) * stride), dim=0)
        for column, weight in enumerate(weights.tolist()):
            mass[row // each, column // each] += weight
    return mass


def choose_fewest(mass: list[float], row: int, tau: float) -> set[int]:
    """The first block, the row's own, and the heaviest others until they have tau of the row's mass."""
    chosen, wanted = {0, row}, tau * sum(mass)
    reached = sum(mass[column] for column in chosen)
    for column in sorted(set(range(row)) - chosen, key=lambda column: (-mass[column], column)):
        if reached < wanted:
            chosen.add(column)
            reached += mass[column]
    return chosen


def choose_lagging(mass: list[float], row: int, tau: float) -> set[int]:
    """Upstream's first chunk: the row's own block alone is forced, and the running sum is one block late."""
    chosen, wanted = {row}, tau * sum(mass)
    others = sorted(range(row), key=lambda column: (-mass[column], column))
    for place, column in enumerate(others):
        reached = mass[row] + sum(mass[other] for other in others[: max(place - 1, 0)])
        if place == 0 or reached < wanted:
            chosen.add(column)
    return chosen if len(chosen) == row + 1 else chosen | {0}
