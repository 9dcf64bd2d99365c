"""Sparse prefills against dense masks made from the rules, and what a request reports of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.engine.step import Heads, Step
from harness.options import budget_tokens
from methods.common.sparse_prefill import SparsePrefill
from tests.reference import sparse
from tests.reference.sparse import FlexOptions, XOptions
from tests.tiny import build, tiny_engine

LENGTHS = [1, 63, 64, 65, 200, 333]


def looking(n: int, layer: int = 0) -> Heads:
    """Random queries and keys, some keys and some distances far louder than others."""
    generator = torch.Generator().manual_seed(n + layer)
    q, k, v = (torch.randn(n, heads, 16, generator=generator) for heads in (4, 2, 2))
    k[torch.randint(0, n, (max(1, n // 20),), generator=generator)] *= 4
    q[-1:] += 2 * k[-5:-4].repeat_interleave(2, 1) if n > 5 else 0
    return Heads(q, k, v, torch.arange(n))


def attended(method: SparsePrefill, heads: Heads) -> tuple[Tensor, Tensor]:
    """What a layer's prefill gives, and which pairs it took: outputs tell them where values are names of keys."""
    n, d = len(heads), heads.v.shape[2]
    names = torch.eye(n, -(-n // d) * d).unsqueeze(1).expand(-1, heads.v.shape[1], -1)
    told = [prefilled(method, replace(heads, v=some)).view(n, -1, d) > 0 for some in torch.split(names, d, 2)]
    return prefilled(method, heads), torch.cat(told, 2)[:, :, :n].transpose(0, 1)


def prefilled(method: SparsePrefill, heads: Heads) -> Tensor:
    method.begin(len(heads), 1)
    return method.attend(1, heads, Step("prefill", 0, len(heads)))


def check(text: str, heads: Heads, expected: Tensor) -> None:
    method = build(text, tiny_engine())
    assert isinstance(method, SparsePrefill)
    out, seen = attended(method, heads)
    assert torch.equal(seen, expected)
    torch.testing.assert_close(out, sparse.attend(heads.q, heads.k, heads.v, expected), atol=1e-5, rtol=1e-5)
    assert method.density()[1] == pytest.approx(sparse.density(expected))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("vertical", "slash"), [(2, 2), (40, 110), (100, 60), (30, 180), (0.3, 0.5)])
def test_minference(n: int, vertical: float, slash: float) -> None:
    heads = looking(n)
    counts = [budget_tokens(share, n) for share in (vertical, slash)]
    expected = sparse.minference(heads.q, heads.k, *counts)
    check(f"minference:vertical={vertical}:slash={slash}", heads, expected)


BANDS = [(4, 16), (0, 50), (128, 100), (70, 1), (3, 64)]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("sinks", "window"), BANDS)
def test_ashape(n: int, sinks: int, window: int) -> None:
    heads = looking(n)
    options = f"sinks={sinks}:window={window if window > 1 else 1 / n}"
    check(f"ashape:{options}", heads, sparse.ashape(heads.q, heads.k, sinks, window))
    for last in (1, 100):
        expected = sparse.trishape(heads.q, heads.k, sinks, window, last)
        check(f"trishape:{options}:last={last}", heads, expected)


FLEX = [FlexOptions(0.9, 0.1, 128), FlexOptions(0.6, 0.3, 130), FlexOptions(0.5, 0.0, 1), FlexOptions(0.7, 1.0, 256)]


@pytest.mark.parametrize("n", [200, 384, 500, 1025])
@pytest.mark.parametrize("options", FLEX, ids=str)
def test_flexprefill(n: int, options: FlexOptions) -> None:
    heads = looking(n)
    least = options.min_budget if options.min_budget > 1 else 1 / n
    text = f"flexprefill:gamma={options.gamma}:tau={options.tau}:min_budget={least}"
    check(text, heads, sparse.flexprefill(heads.q, heads.k, options))


@pytest.mark.parametrize("n", [1, 129, 300, 515])
@pytest.mark.parametrize(("stride", "tau"), [(4, 0.5), (8, 0.9), (16, 0.7), (16, 0.0)])
def test_xattention(n: int, stride: int, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = looking(n)
    monkeypatch.setattr("methods.common.antidiagonals._LOGITS", 10_000)
    for rule, chunk in (("paper", 0), ("upstream", n)):
        expected = sparse.xattention(heads.q, heads.k, XOptions(stride, tau, first_chunk=chunk))
        check(f"xattention:stride={stride}:tau={tau}:rule={rule}", heads, expected)
