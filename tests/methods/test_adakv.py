"""AdaKV's shares of a layer's budget against the rule written out."""

from __future__ import annotations

import pytest
import torch

from harness.engine.request import Request
from harness.runner.catalog import parse_methods
from methods.adakv import AdaKV
from tests.tiny import random_ids, tiny_engine

WINDOW = 3


def method(options: str) -> AdaKV:
    (spec,) = parse_methods(f"adakv:window={WINDOW}:{options}")
    built = spec.build(tiny_engine().context)
    assert isinstance(built, AdaKV)
    return built


def chosen(adakv: AdaKV, scores: torch.Tensor, count: int) -> list[list[int]]:
    """By two layers together, of which the second one's heads are the first one's in another order."""
    tokens, counts = adakv.choose_each(torch.stack([scores, scores.flip(0)]), count)
    first, second = (
        [own[:length].tolist() for own, length in zip(*layer, strict=True)]
        for layer in zip(tokens, counts.tolist(), strict=True)
    )
    alone, lengths = adakv.choose_each(scores.flip(0).unsqueeze(0), count)
    assert second == [own[:length].tolist() for own, length in zip(alone[0], lengths[0].tolist(), strict=True)]
    return first


def expected(scores: list[list[float]], count: int, alpha: float, normalize: bool) -> list[list[int]]:
    budget, n = count - WINDOW, len(scores[0]) - WINDOW
    past = [row[:n] for row in scores]
    weights = [sum(sorted(row)[n - budget :]) / sum(row) if normalize else 1.0 for row in past]
    everywhere = sorted((-past[h][t] * weights[h], h, t) for h in range(len(past)) for t in range(n))
    owners = [h for _, h, _ in everywhere[: budget * len(past)]]
    kept = []
    for head, row in enumerate(past):
        part = round(owners.count(head) * (1 - alpha) + int(alpha * budget))
        best = sorted(range(n), key=lambda t: (-row[t], t))[:part]
        kept.append([*sorted(best), *range(n, n + WINDOW)])
    return kept


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("count", [WINDOW, WINDOW + 1, 13, 29])
def test_heads_share_a_budget(count: int, alpha: float, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.rand(4, 30, generator=generator) ** torch.tensor([[1.0], [2.0], [8.0], [0.5]])
    scores[:, -WINDOW:] = torch.inf
    adakv = method(f"alpha={alpha}:normalize={normalize}")
    assert chosen(adakv, scores, count) == expected(scores.tolist(), count, alpha, normalize)


def test_of_equal_scores_the_first_stay() -> None:
    scores = torch.ones(2, 12)
    scores[:, -WINDOW:] = torch.inf
    assert chosen(method("alpha=0.5"), scores, WINDOW + 4) == [[0, 1, 2, 3, 4, 5, 9, 10, 11], [0, 1, 9, 10, 11]]


def test_memory_is_of_what_is_kept() -> None:
    engine = tiny_engine()
    (spec,) = parse_methods("adakv:budget=64")
    adakv = spec.build(engine.context)
    list(engine.stream(adakv, Request(random_ids(333), 1)))
    lengths = [[len(head.keys) for head in cache.heads()] for cache in adakv.cache]
    shape, spare = engine.context.shape, 1
    assert any(len(set(layer)) > 1 for layer in lengths)
    assert adakv.kv_bytes() == sum(length + spare for layer in lengths for length in layer) * 2 * shape.head_dim * 4
    assert all(abs(sum(layer) / len(layer) - 64) < 1 for layer in lengths)
