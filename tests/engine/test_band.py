"""A band over overlapping views of the keys, its edges by the kernel (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.engine import band
from harness.engine.attention import Flash3Attention
from tests.reference.interpreter import DEVICE, kernels

kernels("band_edges")

CUDA = DEVICE == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32

CASES = [  # n, sinks, window
    (100, 4, 40),
    (97, 0, 33),
    (96, 5, 32),
    (70, 40, 16),
    (33, 4, 32),
    (40, 60, 20),
    (32, 4, 32),
    (30, 4, 50),
    (60, 4, 7),
    (60, 0, 1),
]


class WrittenOut(Flash3Attention):
    """FlashAttention 3 as it is called, in plain PyTorch."""

    def __init__(self) -> None:
        """Imports nothing."""

    def normalised(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[Tensor, Tensor]:
        """As in `Attention`; of fewer queries the last is the last key's."""
        n, m, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        k, v = (x.float().repeat_interleave(group, 2) for x in (k, v))
        logits = torch.einsum("bnhd,bmhd->bnhm", q.float(), k) * q.shape[3] ** -0.5
        if causal:
            ahead = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
            logits = logits.masked_fill(ahead.unsqueeze(1), -torch.inf)
        out = torch.einsum("bnhm,bmhd->bnhd", logits.softmax(-1), v)
        return out.to(q.dtype).contiguous(), logits.logsumexp(-1)


def tensors(n: int, heads: int = 4, kv_heads: int = 2, d: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries rotated for the sinks, and queries, keys and values that lie beside each other."""
    generator = torch.Generator().manual_seed(n)
    every = torch.randn(n, heads + 2 * kv_heads, d, generator=generator).to(DEVICE, DTYPE)
    q, k, v = torch.split(every, [heads, kv_heads, kv_heads], 1)
    return torch.randn(n, heads, d, generator=generator).to(DEVICE, DTYPE), q, k, v


def expected(q_sink: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: int, window: int) -> Tensor:
    """By a mask of all pairs, in float32."""
    q_sink, q, k, v = (x.float().cpu().transpose(0, 1) for x in (q_sink, q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    i, j = torch.arange(q.shape[1]).unsqueeze(1), torch.arange(q.shape[1])
    near, sink = (j <= i) & (j > i - window), (j <= i - window) & (j < sinks)
    logits = torch.where(sink, q_sink @ k.transpose(1, 2), q @ k.transpose(1, 2)) / q.shape[2] ** 0.5
    out: Tensor = logits.masked_fill(~(near | sink), -torch.inf).softmax(-1) @ v
    return out.transpose(0, 1).flatten(1)


def check(n: int, sinks: int, window: int) -> None:
    q_sink, q, k, v = tensors(n)
    wanted = expected(q_sink, q, k, v, sinks, window)
    found = band.banded(WrittenOut(), q, q_sink, k, v, sinks, window)
    assert found.dtype == DTYPE and found.shape == wanted.shape
    assert (found.float().cpu() - wanted).norm() <= (1e-2 if CUDA else 1e-6) * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "sinks", "window"), CASES)
def test_small_blocks(n: int, sinks: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(band, "ROWS", 16)
    check(n, sinks, window)


@pytest.mark.parametrize(("n", "sinks", "window"), [(300, 4, 128), (299, 130, 140), (129, 0, 100)])
def test_blocks_as_they_are(n: int, sinks: int, window: int) -> None:
    check(n, sinks, window)


def test_no_key_or_value_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks but the rows that see everything are one call, on the memory that keys and values have."""
    monkeypatch.setattr(band, "ROWS", 16)
    q_sink, q, k, v = tensors(100)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    class Spied(WrittenOut):
        def normalised(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[Tensor, Tensor]:
            calls.append((q, k, v))
            return super().normalised(q, k, v, causal=causal)

    band.banded(Spied(), q, q_sink, k, v, 4, 40)
    memory = q.untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == memory for call in calls for x in call)
    assert [tuple(x.shape[:2] for x in call) for call in calls] == [((1, 36),) * 3, ((4, 16), (4, 40), (4, 40))]
