"""Which prompt tokens each layer kept: what a token survival map is drawn from, and what the exact gate compares.

Ranges say it exactly where all KV heads of a layer hold the same tokens. Where they differ, or ranges are too many, a
digest tells whether two sets are equal, and shares of the prompt's pieces tell roughly where tokens stayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor  # reports read spans without it

MOST_RANGES = 4096
"""A record with more ranges would weigh more than the rest of the run; it says less instead."""
BINS = 64
"""Pieces of the prompt whose shares are recorded, at most."""
DIGITS = 6
"""Of a layer's hash."""

T = TypeVar("T")
Ranges = list[list[int]]
"""[start, end) pairs, ascending."""
Heads = list[NDArray[np.int64]]
"""Prompt positions that each KV head of a layer holds, ascending; one entry where all hold the same."""


def survivors(positions: Sequence[Sequence[Tensor]], prompt_len: int) -> dict[str, Any]:
    """What a record's `extra` says of the prompt tokens that every layer kept.

    Args:
        positions: for each layer what its KV heads hold, [tokens] int64 each; one entry where all hold the same.
        prompt_len: tokens of the prompt; later ones are left out.

    Returns:
        `kept_spans`: a layer's `Ranges`, None where it is the same as the layer before; None altogether if it is too
        much, or KV heads hold different tokens. Then there are also `kept_digest` (`layer_digest` of every layer's
        positions) and `kept_shares` (a layer's `shares`, None as above).
    """
    layers = [[_prompt_positions(head, prompt_len) for head in heads] for heads in positions]
    if all(len(heads) == 1 for heads in layers):
        spans = folded([ranges(kept) for (kept,) in layers])
        if sum(len(layer or ()) for layer in spans) <= MOST_RANGES:
            return {"kept_spans": spans}
    return {
        "kept_spans": None,
        "kept_digest": layer_digest([_bytes(heads) for heads in layers]),
        "kept_shares": folded([shares(heads, prompt_len) for heads in layers]),
    }


def _prompt_positions(head: Tensor, prompt_len: int) -> NDArray[np.int64]:
    kept = head.cpu().numpy()
    return np.sort(kept[kept < prompt_len])


def ranges(ascending: NDArray[np.int64]) -> Ranges:
    """Runs of consecutive numbers: [n] -> [[start, end), ...]."""
    ends = np.flatnonzero(np.diff(ascending, append=-1) != 1)
    starts = np.concatenate(([0], ends[:-1] + 1))[: len(ends)]
    pairs: Ranges = np.stack((ascending[starts], ascending[ends] + 1), 1).tolist()
    return pairs


def shares(heads: Heads, tokens: int) -> list[float]:
    """The share of tokens x KV heads that was kept in each piece of the prompt, 0 to 1, to three digits.

    Args:
        heads: of one layer.
        tokens: of the prompt.
    """
    edges = bin_edges(tokens, BINS)
    counts = sum(np.histogram(kept, edges)[0] for kept in heads)
    found: list[float] = np.round(counts / (np.diff(edges) * len(heads)), 3).tolist()
    return found


def bin_edges(tokens: int, bins: int) -> NDArray[np.int64]:
    """Where pieces of (nearly) the same size begin and end, [at most bins + 1]; a shorter prompt has one a token."""
    return np.linspace(0, tokens, min(bins, tokens) + 1).round().astype(np.int64)


def layer_digest(layers: Sequence[bytes]) -> str:
    """Hashes of what layers kept, each at the first of the layers that kept the same: "0:5d0c31 10:e2b97a"."""
    hashes = folded([hashlib.sha256(layer).hexdigest()[:DIGITS] for layer in layers])
    return " ".join(f"{layer}:{found}" for layer, found in enumerate(hashes) if found is not None)


def _bytes(heads: Heads) -> bytes:
    counts = np.array([len(kept) for kept in heads])
    return b"".join(array.astype("<i8").tobytes() for array in chain([counts], heads))


def folded(layers: Sequence[T]) -> list[T | None]:
    """The same with None for each layer that is like the one before."""
    return [layer if number == 0 or layer != layers[number - 1] else None for number, layer in enumerate(layers)]


def every_layer(layers: Sequence[T | None]) -> list[T]:
    """What `folded` returned, with the repeated layers written out."""
    found: list[T] = []
    for layer in layers:
        found.append(found[-1] if layer is None else layer)
    return found
