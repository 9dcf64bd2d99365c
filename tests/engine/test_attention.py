"""Every attention kernel against attention written out in float32; CUDA's own where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.backends.cuda import cudnn_sdp_enabled
from torch.nn.functional import scaled_dot_product_attention

from harness.cli import main
from harness.engine.attention import KERNELS, Attention, check_attention, pick_attention
from harness.engine.band import banded
from harness.engine.shape import ModelShape
from harness.errors import InputError

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPE = ModelShape("llama", 1, 512, 512, 8, 2, 64, 100, 1024)
SIZES = [(1, 1), (7, 7), (300, 300), (1, 200), (5, 200), (128, 333)]


def written_out(q: Tensor, k: Tensor, v: Tensor, sinks: int = 0, window: int = 1 << 30) -> Tensor:
    """[n, heads * d] in float32; query i is the token of key m - n + i and sees sinks and window."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    q, k, v = (x.float().cpu() for x in (q, k, v))
    out, key = torch.empty(n, q.shape[1], q.shape[2]), torch.arange(m)
    for row in range(n):
        last = m - n + row
        seen = (key <= last) & ((key < sinks) | (key > last - window))
        for head in range(q.shape[1]):
            logits = k[seen, head // group] @ q[row, head] / q.shape[2] ** 0.5
            out[row, head] = torch.softmax(logits, 0) @ v[seen, head // group]
    return out.flatten(1)


def kernel_here(name: str) -> Attention:
    try:
        check_attention(name, DEVICE)
        return pick_attention(name, SHAPE, DEVICE, DTYPE)
    except InputError as error:
        pytest.skip(str(error))


def random_heads(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + m)
    q = torch.randn(n, 8, 64, generator=generator).to(DEVICE, DTYPE)
    k, v = (torch.randn(m, 2, 64, generator=generator).to(DEVICE, DTYPE) for _ in range(2))
    return q, k, v


def agree(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-2 if CUDA else 1e-5
    return bool((found.float().cpu() - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_a_kernel_computes_causal_attention(kernel: str, n: int, m: int) -> None:
    q, k, v = random_heads(n, m)
    assert agree(kernel_here(kernel).causal(q, k, v), written_out(q, k, v))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("n", "sinks", "window"),
    [(70, 4, 16), (64, 0, 16), (33, 4, 40), (50, 20, 7), (20, 3, 1), (333, 140, 130), (256, 0, 128), (150, 4, 200)],
)
def test_a_band_is_joined_from_causal_attention(kernel: str, n: int, sinks: int, window: int) -> None:
    q, k, v = random_heads(n, n)
    found = banded(kernel_here(kernel), q, q, k, v, sinks, window)
    assert agree(found, written_out(q, k, v, sinks, window))


@pytest.mark.parametrize(("n", "m"), [(1, 9), (3, 9)])
def test_cudnn_plans_for_prefills_alone(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        return scaled_dot_product_attention(*args, **options)

    monkeypatch.setattr("harness.engine.attention.sdpa", spy)
    Attention().causal(*random_heads(n, m))
    Attention().causal(*random_heads(m, m))
    assert seen == [False, True]


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_a_backend_that_does_not_serve_is_never_called(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called, it would print a dozen warnings: float32 on a GPU, anything without one."""
    monkeypatch.setattr("harness.engine.attention.sdpa", lambda *_, **__: pytest.fail("called"))
    with pytest.raises(InputError, match=f"--attention {kernel} does not run here"):
        pick_attention(kernel, SHAPE, DEVICE, torch.float32)


@pytest.mark.skipif(not CUDA, reason="backends are tried on CUDA alone")
@pytest.mark.filterwarnings("error:.*kernel not used because")
def test_auto_warns_of_nothing() -> None:
    assert pick_attention("auto", SHAPE, DEVICE, torch.float32).kernel == "sdpa"


def test_auto_takes_what_works() -> None:
    found = pick_attention("auto", SHAPE, DEVICE, DTYPE)
    assert isinstance(found, Attention) and (CUDA or found.kernel == "sdpa")


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "sdpa"])
def test_a_kernel_of_another_device_is_one_line(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--attention", kernel, "--device", "cpu"])
    assert stop.value.code == 2 and f"--attention {kernel} needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fused", "graphed"])
def test_an_engine_of_another_device_is_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--engine", kind, "--device", "cpu", "--limit", "1"])
    assert stop.value.code == 2 and f"--engine {kind} does not run here" in capsys.readouterr().err
