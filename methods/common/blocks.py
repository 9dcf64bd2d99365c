"""Blocks of consecutive tokens: how relevant they are, and which rows they are (SlimInfer, arXiv 2508.06447).

A block is cut into units of a few tokens and counts as much as its best unit. Five readings of a unit's relevance:

- `token_softmax`: each token's attention from the last queries, summed over the unit, mean over heads;
- `token_peak`: the same, but a unit counts as much as to the head that wants it most. This project's own: few heads
  retrieve, and a mean drowns them;
- `query_peak`: mean over heads again, but of each token's attention from the query that wants it most. Our own, too:
  a question's words ask for different things;
- `softmax`: over units, of the mean query against mean keys, mean over heads;
- `absdot`: the literal one, mean over heads of |mean query . mean key|. A few loud heads decide, and it finds less than
  random blocks do.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.engine.hardware import kernels_run, kernels_take
from harness.engine.parallel import Ranks
from methods.common.scores import head_attention, head_dots, last_attention, token_attention

Relevance = Literal["token_softmax", "token_peak", "query_peak", "softmax", "absdot"]


def unit_scores(reading: Relevance, q: Tensor, k: Tensor, raters: Tensor, unit: int, ranks: Ranks) -> Tensor:
    """Relevance of each unit to the last queries.

    Args:
        reading: which one, see above.
        q: [w, heads, d], the queries of the last w of the n tokens.
        k: [n, kv_heads, d].
        raters: which queries count, [w] bool.
        unit: tokens a unit.
        ranks: who has the other heads.

    Returns:
        [ceil(n / unit)] float32, over the heads of all ranks.
    """
    if reading == "token_peak":
        return ranks.max(unit_sums(head_attention(q, k, _weights(raters)).T, unit).amax(1))
    return ranks.mean(_mean_over_heads(reading, q, k, raters, unit))


def _mean_over_heads(reading: Relevance, q: Tensor, k: Tensor, raters: Tensor, unit: int) -> Tensor:
    if reading == "query_peak":
        return query_peaks(q, k, raters, unit)
    weights = _weights(raters)
    if reading == "token_softmax":
        return unit_sums(token_attention(q, k, weights), unit)
    mean = torch.einsum("w,whd->hd", weights, q.float()).to(q.dtype).unsqueeze(0)
    means = unit_means(k, unit)
    if reading == "absdot":
        return unit_absdot(mean, means)
    return unit_attention(mean, means.unsqueeze(0), means.new_zeros((1, len(means)), dtype=torch.float32))[0]


def query_peaks(q: Tensor, k: Tensor, raters: Tensor, unit: int) -> Tensor:
    """Attention of each token from the query that wants it most, mean over heads, summed over units.

    Shapes as in `unit_scores`.
    """
    if kernels_take(k):
        from harness.engine.kernels.query_peaks import query_peaks

        return query_peaks(q, k, unit, raters)
    return unit_sums((last_attention(q, k) * _weights(raters).view(-1, 1)).amax(1).mean(0), unit)


def _weights(raters: Tensor) -> Tensor:
    """Each an equal part of 1: [w] bool -> [w] float32."""
    counted = raters.float()
    return counted / counted.sum()


def best_blocks(
    scores: Tensor, count: int, block: int, rows: int, ends: tuple[int, int], *, units: int = 1
) -> tuple[Tensor, Tensor]:
    """The best blocks, in the order of the text, and their tokens.

    Args:
        scores: of units, float32, `units` a block, which is worth as much as its best; the last may have fewer.
        count: how many are chosen; as many as `ends` at least.
        block: tokens a block; the last one may be shorter.
        rows: tokens of all blocks.
        ends: first and last blocks that are chosen whatever their scores; the last one is.

    Returns:
        [count] int64, and indices of tokens, int64; both ascending.
    """
    if kernels_run(scores.device):
        from harness.engine.kernels.block_select import best_blocks

        return best_blocks(scores, count, block, rows, *ends, units=units)
    chosen = lifted(block_maxima(scores, units), *ends).topk(count).indices.sort().values
    return chosen, block_rows(chosen, block, rows)


def unit_attention(q: Tensor, means: Tensor, lift: Tensor) -> Tensor:
    """Softmax over units of a query against their mean keys, mean over heads, of each request.

    Args:
        q: [requests, heads, d].
        means: [requests, units, kv_heads, d].
        lift: what is added to the units' logits, [requests, units].

    Returns:
        [requests, units] float32, each request's summing to 1.
    """
    groups = q.view(len(q), means.shape[2], -1, q.shape[2])
    logits = (groups @ means.permute(0, 2, 3, 1)).float() * (1.0 / math.sqrt(q.shape[2]))
    return (logits + lift[:, None, None]).softmax(-1).mean((1, 2))


def unit_absdot(q: Tensor, means: Tensor) -> Tensor:
    """Mean over heads of |query . mean key|: q [1, heads, d], means [units, kv_heads, d] -> [units] float32."""
    return head_dots(q, means).float().abs().mean((0, 1))


def unit_means(x: Tensor, unit: int) -> Tensor:
    """Mean over runs of `unit` tokens, the last run possibly shorter: [n, ...] -> [ceil(n / unit), ...]."""
    sums = unit_sums(x, unit)
    sums[:-1] /= unit
    sums[-1] /= x.shape[0] - (sums.shape[0] - 1) * unit
    return sums


def unit_sums(x: Tensor, unit: int) -> Tensor:
    """Sum over runs of `unit` tokens, the last run possibly shorter: [n, ...] -> [ceil(n / unit), ...]."""
    padded = pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % unit))
    return padded.reshape(-1, unit, *x.shape[1:]).sum(1)


def lifted(scores: Tensor, sink: int, tail: int) -> Tensor:
    """Makes the first `sink` and the last `tail` blocks the best ones, in place, [blocks]."""
    scores[:sink].fill_(torch.inf)
    scores[-tail:].fill_(torch.inf)
    return scores


def block_maxima(units: Tensor, per_block: int) -> Tensor:
    """Best unit of each block: [units] -> [ceil(units / per_block)]."""
    padded = pad(units, (0, -units.shape[0] % per_block), value=-torch.inf)
    return padded.reshape(-1, per_block).amax(1)


def block_rows(blocks: Tensor, block: int, rows: int) -> Tensor:
    """Tokens of the given blocks of `rows` tokens, in the order of the blocks.

    Args:
        blocks: [m], the last block in the last place, so that only that one can be short and the number of tokens is
            known without asking the device; ascending where the tokens are to be.
        block: tokens a block.
        rows: tokens of all blocks.
    """
    index = block_tokens(blocks, block)
    return index[: index.shape[0] - (-rows % block)]


def block_tokens(blocks: Tensor, block: int) -> Tensor:
    """The same where all of the blocks are full: [m] -> [m * block]."""
    return (blocks.unsqueeze(1) * block + torch.arange(block, device=blocks.device)).flatten()
