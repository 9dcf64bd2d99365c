"""Attention to chosen tokens, and the way back for those left behind: token by token, in plain Python and PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Token(NamedTuple):
    slot: int
    position: int


class Row(NamedTuple):
    hidden: Tensor
    position: int
    slot: int


def logits(q: Tensor, keys: Tensor) -> Tensor:
    """[heads, d], [n, kv_heads, d] -> [heads, n] float64."""
    group = q.shape[0] // keys.shape[1]
    scale = 1 / math.sqrt(q.shape[1])
    return torch.stack([keys[:, head // group].double() @ query * scale for head, query in enumerate(q.double())])


def norms(q: Tensor, keys: Tensor) -> Tensor:
    """Logarithm to base 2 of every head's softmax denominator: [heads] float64."""
    return logits(q, keys).logsumexp(1) / math.log(2)


def scores(q: Tensor, keys: Tensor) -> Tensor:
    """Attention that each key gets, averaged over heads: [n] float64."""
    return logits(q, keys).softmax(1).mean(0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, places: list[Token], keys: Tensor, values: Tensor, listed: list[Token]
) -> tuple[Tensor, Tensor]:
    """Each row attends to the listed tokens and to the rows that have a slot, as far as they are not behind it.

    Args:
        q: [rows, heads, d].
        k, v: [rows, kv_heads, d].
        places: the rows'.
        keys, values: by slot, [room, kv_heads, d].

    Returns:
        Attention [rows, heads * d] and norms [rows, heads], both float64.
    """
    outs, all_norms = [], []
    for query, place in zip(q, places, strict=True):
        cached = [token.slot for token in listed if token.position <= place.position]
        beside = [row for row, other in enumerate(places) if other.slot >= 0 and other.position <= place.position]
        seen_keys, seen_values = torch.cat((keys[cached], k[beside])), torch.cat((values[cached], v[beside])).double()
        weights, group = logits(query, seen_keys).softmax(1), q.shape[1] // k.shape[1]
        outs.append(torch.cat([weight @ seen_values[:, head // group] for head, weight in enumerate(weights)]))
        all_norms.append(norms(query, seen_keys))
    return torch.stack(outs), torch.stack(all_norms)


@dataclass
class State:
    """What is known of every token, by segment or by position.

    Args:
        tokens: by segment: those chosen, the newest last.
        done: by segment: how many of them, from the first, have keys and values.
        arriving: by segment: how many had none when they were chosen.
        slots: by segment and position.
        depths: by position: the segment before which the token waits.
        hidden: by position: what a waiting token has become so far.
        lengths: by segment: slots used.
        wanted: by segment and the newest token's position: how many to choose.
    """

    tokens: list[list[Token]]
    done: list[int]
    arriving: list[int]
    slots: list[list[int]]
    depths: list[int]
    hidden: list[Tensor]
    lengths: list[int]
    wanted: list[list[int]]

    def choose(self, scores: list[float], segment: int) -> None:
        """The newest is chosen in any case, and the best of the others; those that arrive go by position."""
        listed = self.tokens[segment - 1]
        newest, others = len(listed) - 1, range(len(listed) - 1)
        wanted = self.wanted[segment][listed[newest].position]
        best = sorted(others, key=lambda index: (-scores[index], index))[: wanted - 1]
        chosen = [listed[index].position for index in sorted(best)]
        cached = [position for position in chosen if self.depths[position] > segment]
        arriving = sorted(position for position in chosen if self.depths[position] == segment)
        self.tokens[segment] = [Token(self.slots[segment][position], position) for position in cached]
        for position in arriving:
            self._arrive(position, segment, segment + 1)
        self._arrive(listed[newest].position, segment, len(self.tokens))
        self.done[segment], self.arriving[segment] = len(cached), len(arriving) + 1

    def _arrive(self, position: int, segment: int, depth: int) -> None:
        slot = self.lengths[segment]
        self.lengths[segment] += 1
        self.tokens[segment].append(Token(slot, position))
        self.slots[segment][position] = slot
        self.depths[position] = depth

    def enter(self, segment: int, newest: Tensor, count: int, last: bool) -> list[Row]:
        """The next rows to run: the last listed, the newest among them, or the first of those that wait, without it.

        Instead of tokens that need not run, and behind the last, there is padding.
        """
        listed, done = self.tokens[segment], self.done[segment]
        newest_index, rows = len(listed) - 1, []
        first = len(listed) - count if last else done
        for index in range(first, first + count):
            if last and index == newest_index:
                rows.append(Row(newest, listed[index].position, listed[index].slot))
            elif done <= index < newest_index:
                token = listed[index]
                rows.append(Row(self.hidden[token.position], token.position, token.slot))
            else:
                rows.append(Row(newest, listed[newest_index].position, -1))
        return rows

    def leave(self, rows: list[Row], last: bool) -> None:
        """Keeps what the rows have become, but for padding and the newest."""
        for row in rows[:-1] if last else rows:
            if row.slot >= 0:
                self.hidden[row.position] = row.hidden
