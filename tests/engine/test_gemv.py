"""A decode step's products against PyTorch's, however they are cut; interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.compiler import compiler, launch
from tests.reference.interpreter import DEVICE, kernels

gemv = kernels("gemv")
Tiling = gemv.Tiling
DIM, KV_HEADS, EPS = 8, 1, 1e-5
# 72 columns: more and fewer than one round of tiles, and a tile that is not full.
TILINGS = [Tiling(8, 64), Tiling(2, 16, ahead=3, warps=1), Tiling(4, 32, ahead=4, warps=2)]


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


X, GAIN, RESIDUAL, WEIGHT = some(1, 72), some(72), some(1, 40), some(40, 72)
ANGLES = some(1, DIM // 2).repeat(1, 2).cos(), some(1, DIM // 2).repeat(1, 2).sin()
BIAS = some(40)


def normed() -> Tensor:
    return nn.functional.rms_norm(X, (72,), GAIN, EPS)


def rotated() -> Tensor:
    heads = nn.functional.linear(normed(), WEIGHT, BIAS).view(-1, DIM)
    left, right = heads.chunk(2, 1)
    turned = heads * ANGLES[0] + torch.cat([-right, left], 1) * ANGLES[1]
    return torch.cat([turned[:-KV_HEADS], heads[-KV_HEADS:]]).view(1, -1)


def swiglu() -> Tensor:
    gate, up = nn.functional.linear(normed(), WEIGHT).chunk(2, 1)
    return nn.functional.silu(gate) * up


PRODUCTS: dict[str, tuple[Any, Any]] = {
    "norm": (lambda: gemv.norm_gemv(X, GAIN, EPS, WEIGHT), lambda: nn.functional.linear(normed(), WEIGHT)),
    "add": (lambda: gemv.add_gemv(RESIDUAL, X, WEIGHT), lambda: RESIDUAL + nn.functional.linear(X, WEIGHT)),
    "swiglu": (lambda: gemv.swiglu_gemv(X, GAIN, EPS, WEIGHT), swiglu),
    "qkv": (lambda: gemv.qkv_gemv(X, GAIN, EPS, WEIGHT, BIAS, ANGLES, DIM, 40 - KV_HEADS * DIM), rotated),
}


def cut(monkeypatch: pytest.MonkeyPatch, product: str, tiling: Any) -> Tensor:
    monkeypatch.setattr(gemv, "tiling", lambda *_: tiling)
    out: Tensor = PRODUCTS[product][0]()
    return out


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_pytorchs_however_it_is_cut(monkeypatch: pytest.MonkeyPatch, product: str, tiling: Any) -> None:
    torch.testing.assert_close(cut(monkeypatch, product, tiling), PRODUCTS[product][1](), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_and_tiles_ahead_change_no_bit(monkeypatch: pytest.MonkeyPatch, product: str) -> None:
    one = cut(monkeypatch, product, Tiling(8, 32))
    rtol = 0 if DEVICE == "cpu" else 1e-6  # on a GPU a tile's shape decides which lanes add what
    for tiling in (Tiling(2, 32), Tiling(4, 32, ahead=2), Tiling(16, 32, ahead=4)):
        torch.testing.assert_close(cut(monkeypatch, product, tiling), one, rtol=rtol, atol=rtol)


def test_products_that_are_launched_early_compile() -> None:
    cut = {"ROWS": 2, "BLOCK": 512, "AHEAD": 3, "num_warps": 2, "PDL": True, "launch_pdl": True}
    half = torch.zeros(1, dtype=torch.bfloat16)
    args = (half, half, half, half, half, EPS, 1536, 1536)
    compiler().check(launch(gemv._plain.fn, args, {"NORM": True, "ADD": False, **cut}))


@pytest.mark.parametrize("product", gemv._TILINGS)
@pytest.mark.parametrize("shape", [(1, 1), (2048, 1536), (4096, 14336), (151936, 1536)])
def test_every_shape_has_a_tiling_of_powers_of_two(product: str, shape: tuple[int, int]) -> None:
    tiling = gemv.tiling(product, *shape)
    assert all(size & (size - 1) == 0 < size for size in (tiling.rows, tiling.block, tiling.warps))
    assert tiling.ahead > 0
    assert tiling.rows > 1 or product not in ("swiglu", "qkv")
