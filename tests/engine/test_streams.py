"""What the device does beside other work comes out as if it had been done in its turn."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from harness.engine.streams import beside, sent
from tests.reference.interpreter import DEVICE


def test_what_is_sent_is_what_was_there_then() -> None:
    x = torch.arange(5, device=DEVICE)
    arrived = sent(x.clone())
    x.zero_()
    assert arrived().tolist() == [0, 1, 2, 3, 4] and arrived().device.type == "cpu"


def test_work_beside_sees_what_came_before_and_is_seen_by_what_comes_behind() -> None:
    x = torch.full((1000,), 2.0, device=DEVICE)
    x += 1
    done = beside(partial(torch.square, x), x.device)
    other = x * 2
    assert ((done() + other) == 15).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_work_beside_reads_is_not_given_away_before_it_is_done() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    expected = (x + 1).matrix_power(8).sum()
    done = beside(lambda own=x + 1: own.matrix_power(8).sum(), x.device)  # type: ignore[misc]
    for _ in range(8):
        torch.zeros_like(x)
    torch.testing.assert_close(done(), expected, rtol=1e-3, atol=0)
