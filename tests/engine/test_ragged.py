"""Caches whose KV heads hold different numbers of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.cache import HeadTokens, LayerCache
from harness.engine.ragged import RaggedCache

D, SPARE = 16, 5
KEPT = [[0, 2, 5], [5]]


def filled(keys: Tensor, values: Tensor) -> RaggedCache:
    cache = RaggedCache(SPARE, 9)
    index = [torch.tensor(kept) for kept in KEPT]
    cache.append_heads([HeadTokens(keys[own, h], values[own, h], own) for h, own in enumerate(index)])
    return cache


def test_each_head_takes_what_it_holds() -> None:
    keys, values = torch.randn(2, 6, 2, D)
    cache = filled(keys, values)
    token = 2 * D * 4
    assert cache.nbytes == (4 + 2 * SPARE) * token and cache.resident_nbytes == 4 * token
    assert (cache.length, cache.room) == (3, SPARE)
    assert [positions.tolist() for positions in cache.kept_positions()] == KEPT
    assert cache.tokens_before(5) == 1 and cache.tokens_before(6) == 2 and cache.tokens_before(1) == 0.5
    for head, (own, kept) in enumerate(zip(cache.heads(), KEPT, strict=True)):
        assert torch.equal(own.keys, keys[kept, head]) and torch.equal(own.values, values[kept, head])
    cache.reset()
    assert cache.nbytes == cache.length == cache.room == 0 and not cache.heads()
    assert [positions.tolist() for positions in cache.kept_positions()] == [[]]


def test_each_head_forgets_tokens_of_its_own() -> None:
    keys, values = torch.randn(2, 6, 2, D)
    cache = filled(keys, values)
    cache.keep_heads([torch.tensor([0, 2]), None])
    assert [positions.tolist() for positions in cache.kept_positions()] == [[0, 5], [5]]
    assert torch.equal(cache.heads()[0].keys, keys[[0, 5], 0]) and torch.equal(cache.heads()[1].values, values[[5], 1])
    assert (cache.length, cache.room) == (2, SPARE)


@pytest.mark.parametrize("new", [1, 3])
def test_attention_sees_what_each_head_holds(new: int) -> None:
    keys, values = torch.randn(2, 6 + new, 2, D)
    q, cache = torch.randn(new, 4, D), filled(keys, values)
    cache.append(keys[6:], values[6:], torch.arange(6, 6 + new))
    mask = torch.zeros(4, new, 6 + new, dtype=torch.bool)
    for head in range(4):
        mask[head][:, KEPT[head // 2]] = True
    mask[:, :, 6:] = torch.ones(new, new, dtype=torch.bool).tril()
    torch.testing.assert_close(cache.attend(Attention(), q), Attention().masked(q, keys, values, mask))
    cache.extended(2, 6 + new)
    assert [len(own.positions) for own in cache.heads()] == [5 + new, 3 + new]


def test_addresses_are_those_of_what_is_held() -> None:
    cache, x = LayerCache(SPARE), torch.randn(6, 2, D)
    cache.append(x, -x, torch.arange(6))
    cache.slide(1, 2)
    assert cache.addresses == (cache.keys.data_ptr(), cache.values.data_ptr())


def test_there_is_no_tensor_of_all_heads() -> None:
    cache = filled(*torch.randn(2, 6, 2, D))
    for name in ("keys", "values", "positions"):
        with pytest.raises(TypeError, match="different numbers"):
            getattr(cache, name)
    with pytest.raises(TypeError, match="different numbers"):
        cache.keep(torch.tensor([0]))
