"""What methods that keep few keys and values ask of a prompt, against formulas; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.step import Heads
from methods.common import take as take_module
from tests.reference import decode
from tests.reference.interpreter import DEVICE, kernels

kernels("take_tokens")
best_tokens = kernels("token_select").best_tokens
normal = kernels("normal_queries")
rowwise = kernels("rowwise")
sums = kernels("column_sums")
unlike = kernels("unlike_keys")


def scores(kind: str, tokens: int) -> Tensor:
    torch.manual_seed(tokens)
    if kind == "ties":
        return torch.randint(-2, 3, (3, tokens)).float()
    if kind == "small":
        return torch.rand(2, tokens) * 1e-5
    if kind == "zeros":
        return torch.where(torch.rand(2, tokens) < 0.5, 0.0, -0.0)
    if kind == "infinite":
        return torch.tensor([-torch.inf, torch.inf, 1.0, 2.0])[torch.randint(4, (2, tokens))]
    if kind == "close":
        return torch.nextafter(torch.full((2, tokens), 20.0), torch.randn(2, tokens) * 100)
    return torch.randn(2, tokens) * 5 + 3


@pytest.mark.parametrize("kind", ["ties", "small", "zeros", "infinite", "close", "plain"])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_best_tokens(kind: str, tokens: int) -> None:
    rows = scores(kind, tokens)
    for count in sorted({1, tokens // 16 + 1, tokens}):
        counts = torch.full((len(rows),), count, device=DEVICE)
        chosen = best_tokens(rows.to(DEVICE), counts, count, block=256, warps=4)
        assert torch.equal(chosen, best_tokens(rows.to(DEVICE), None, count, block=256, warps=4))
        assert chosen.dtype == torch.int64 and chosen.tolist() == [decode.best(row, count) for row in rows.tolist()]


def test_best_tokens_of_a_long_prompt() -> None:
    rows = scores("plain", 20001)
    chosen = best_tokens(rows.to(DEVICE), torch.full((len(rows),), 2048, device=DEVICE), 2048)
    assert torch.equal(chosen.cpu(), rows.topk(2048).indices.sort().values)


def test_best_tokens_of_lists_that_keep_different_numbers() -> None:
    rows, counts = torch.randint(9, (4, 50)).float(), [0, 7, 50, 31]
    chosen = best_tokens(rows.to(DEVICE), torch.tensor(counts, device=DEVICE), 50, block=32, warps=1).tolist()
    for row, count, own in zip(rows.tolist(), counts, chosen, strict=True):
        assert own[:count] == (decode.best(row, count) if count else [])


SHAPES = [
    # kv_heads, group, d, rows, tokens
    (1, 1, 16, 1, 1),
    (2, 4, 32, 5, 40),
    (1, 3, 16, 33, 70),
    (2, 2, 64, 20, 20),
]


def strided(*shape: int, seed: int = 0) -> Tensor:
    """Random heads that lie apart, as those of a joined projection do."""
    wide = torch.randn((shape[0], shape[1] + 1, shape[2]), generator=torch.Generator().manual_seed(seed))
    return wide.to(DEVICE)[:, :-1]


def attention(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, [heads, w, n] float64, and the log of what they were divided by."""
    (w, heads, d), n = q.shape, len(k)
    keys = k.cpu().double().repeat_interleave(heads // k.shape[1], 1)
    logits = torch.einsum("ihd,jhd->hij", q.cpu().double(), keys) / d**0.5
    logits = logits.masked_fill(torch.ones(w, n).triu(n - w + 1).bool(), -torch.inf)
    return logits.softmax(2), logits.logsumexp(2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_attention(shape: tuple[int, int, int, int, int]) -> None:
    kv_heads, group, d, rows, tokens = shape
    q, k = strided(rows, kv_heads * group, d), strided(tokens, kv_heads, d, seed=1)
    weights, norms = attention(q, k)
    found = sums.row_norms(q, k, sums.Tile(16, 16))
    torch.testing.assert_close(found.cpu().double(), norms.T, atol=1e-5, rtol=1e-5)
    got = sums.attention_sums(q, k, norms.float().to(DEVICE).T, sums.Tile(32, 16))
    expected = weights.sum(1).view(kv_heads, group, tokens).sum(1)
    torch.testing.assert_close(got.cpu().double(), expected, atol=1e-5, rtol=1e-5)
    part = sums.attention_sums(q, k, norms.float().to(DEVICE).T, sums.Tile(32, 16), factor=0.25)
    torch.testing.assert_close(part, got / 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_absolute_products(shape: tuple[int, int, int, int, int]) -> None:
    kv_heads, group, d, rows, tokens = shape
    each, v = (
        [strided(rows, kv_heads * group, d, seed=seed) for seed in (2, 0)],
        strided(tokens, 2 * kv_heads, d, seed=1),
    )
    x = torch.cat([one.cpu() for one in each], 1)
    products = torch.einsum("ihd,jhd->hij", x, v.cpu().repeat_interleave(group, 1)).abs().sum(1)
    got = sums.absolute_sums(each, v, sums.Tile(32, 16))
    torch.testing.assert_close(got.cpu(), products.view(2 * kv_heads, group, tokens).sum(1), atol=1e-4, rtol=1e-5)


def test_norms_of_rows_that_see_nothing_of_a_share() -> None:
    q, k = strided(60, 1, 16), strided(2100, 1, 16, seed=1)
    norms = attention(q, k)[1]
    found = sums.row_norms(q, k)
    torch.testing.assert_close(found.cpu().double(), norms.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_tokens_go_into_a_cache_as_gathering_puts_them_there(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, positions = strided(70, 3, 20), torch.randn(70, 3, 20, device=DEVICE), torch.arange(70, device=DEVICE) * 2
    index = torch.stack([torch.randperm(70)[:33].sort().values for _ in range(3)]).to(DEVICE)
    ours, theirs = LayerCache(5), LayerCache(5)
    for taken, kernel in ((ours, True), (theirs, False)):
        monkeypatch.setattr(take_module, "kernels_run", lambda _, on=kernel: on)
        take_module.take(taken, k, v, positions, index.T if own else index[1])
    assert ours.length == 33 and ours.room == 5 and ours.alike != own
    for mine, other in zip(ours.heads(), theirs.heads(), strict=True):
        assert all(torch.equal(*parts) for parts in zip(mine, other, strict=True))


@pytest.mark.parametrize("width", [3, 1])
@pytest.mark.parametrize("own", [True, False])
def test_tokens_go_into_many_caches_at_once(width: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = strided(70, 6, 20), torch.randn(70, 6, 20, device=DEVICE)
    heads = Heads(k, k, v, torch.arange(70, device=DEVICE) * 2)
    lists = torch.stack([torch.randperm(70)[:33].sort().values for _ in range(6)]).to(DEVICE)[:: 1 if own else width]
    counts, found = [33, 20, 33, 1, 2, 7][: 6 // width], []
    for kernel in (True, False):
        found.append([LayerCache(5) for _ in counts])
        monkeypatch.setattr(take_module, "kernels_run", lambda _, on=kernel: on)
        take_module.take_each(found[-1], heads, lists, counts)
    for ours, theirs, count in zip(*found, counts, strict=True):
        assert ours.length == count and ours.room == 5 and ours.alike == theirs.alike
        for mine, other in zip(ours.heads(), theirs.heads(), strict=True):
            assert all(torch.equal(*parts) for parts in zip(mine, other, strict=True))


@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 16), (70, 3, 32), (4200, 1, 16)])
def test_moments_of_turned_queries(n: int, heads: int, d: int) -> None:
    q, angles = strided(n, heads, d), torch.rand(n + 1, d // 2, generator=torch.Generator().manual_seed(2)) * 6
    both = torch.cat((angles.cos(), angles.sin()), 1).to(DEVICE)
    found = normal.moments(q, both[:n], both[n] * 0.75, rows=32 if n < 100 else 128)
    turns = torch.polar(torch.ones(n + 1, d // 2).double(), angles.double())
    pairs = torch.complex(*q.cpu().double().chunk(2, 2)) * (turns[:n] * turns[n] * 0.75).unsqueeze(1)
    turned = torch.cat((pairs.real, pairs.imag), 2)
    torch.testing.assert_close(found[0].cpu().double(), turned.mean(0), atol=1e-5, rtol=1e-5)
    for head, covariance in enumerate(found[1].cpu().double()):
        expected = turned[:, head].T.cov(correction=0).view(d, d)
        torch.testing.assert_close(covariance, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 16), (70, 3, 32)])
def test_norms_of_heads(n: int, heads: int, d: int) -> None:
    x = strided(n, heads, d)
    torch.testing.assert_close(rowwise.head_norms(x), x.norm(dim=2))


@pytest.mark.parametrize(("kv_heads", "group", "d", "n"), [(1, 1, 16, 1), (2, 4, 32, 50), (1, 3, 16, 130)])
def test_logits_of_normal_queries(kv_heads: int, group: int, d: int, n: int) -> None:
    k, mean = strided(n, kv_heads, d), torch.randn(kv_heads * group, d)
    covariance = torch.randn(kv_heads * group, d, d)
    found = normal.normal_logits(k, mean.to(DEVICE), covariance.to(DEVICE), tokens=32).cpu().double()
    for head in range(kv_heads * group):
        keys = k[:, head // group].cpu().double()
        expected = keys @ mean[head].double() / d**0.5
        expected += ((keys @ covariance[head].double()) * keys).sum(1) / (2 * d)
        torch.testing.assert_close(found[head // group, head % group], expected, atol=1e-4, rtol=1e-4)


def stays(keys: Tensor, count: int, block: int) -> list[int]:
    """Tokens that stay of one KV head's keys, [n, d], round by round."""
    directions, kept = torch.nn.functional.normalize(keys.double(), dim=1), list(range(count))
    for start in range(count, len(keys), block):
        seen = kept + list(range(start, min(start + block, len(keys))))
        unlikeness = -(directions[seen] @ directions[seen].mean(0))
        kept = [seen[index] for index in decode.best(unlikeness.tolist(), count)]
    return kept


@pytest.mark.parametrize(
    ("kv_heads", "d", "n", "count", "block"), [(2, 32, 90, 40, 7), (1, 16, 50, 1, 100), (3, 16, 70, 69, 1)]
)
def test_keys_unlike_their_mean(kv_heads: int, d: int, n: int, count: int, block: int) -> None:
    k = strided(n, kv_heads, d) + 0.5
    found = unlike.unlike_keys(k, k.norm(dim=2), count, block, tile=16, width=32, warps=1)
    assert found.tolist() == [stays(keys, count, block) for keys in k.cpu().unbind(1)]


def test_of_equal_keys_the_first_stay() -> None:
    k = torch.ones(40, 1, 16, device=DEVICE)
    assert unlike.unlike_keys(k, k.norm(dim=2), 9, 4, tile=16, width=32, warps=1).tolist() == [list(range(9))]
