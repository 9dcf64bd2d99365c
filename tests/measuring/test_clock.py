"""Peak memory of one request in a process that has served others."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.generation import Work
from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.step import Rows, Step
from harness.measuring.clock import PeakMemory, measure
from methods.full import Full
from tests.tiny import random_ids, tiny_engine

MIB = 2**20


class Hoarder(Full):
    """Full attention that holds 100 MiB more, in small pieces."""

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        super().begin(prompt_len, max_new_tokens)
        self.hoard = [torch.ones(MIB // 32) for _ in range(800)]

    def end(self) -> None:
        super().end()
        self.hoard.clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is not measured here")
def test_a_method_that_holds_less_has_the_smaller_peak_whatever_ran_before() -> None:
    engine, ids, left_behind = tiny_engine(), random_ids(50), list[Tensor]()
    peaks: dict[type[Full], list[int]] = {Full: [], Hoarder: []}
    for kind in (Full, Hoarder, Full, Hoarder, Full):
        method = kind(kind.Options(), engine.context)
        peak = measure(engine, method, Request(ids, 3)).peak_memory_bytes
        # Something that stays lies behind what is freed now, as a record does.
        left_behind.append(torch.ones(1024))
        method.end()
        assert peak is not None
        peaks[kind].append(peak)
    assert max(peaks[Full]) + 50 * MIB < min(peaks[Hoarder])


def test_nothing_is_claimed_where_the_system_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.measuring.clock.sys.platform", "darwin")
    assert PeakMemory(torch.device("cpu")).read() is None


def test_a_prefill_that_is_recorded_on_the_way_is_not_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids, captures = tiny_engine(), random_ids(50), [3, 0]
    begun: list[int] = []
    through = Engine._through

    def recording(self: Engine, method: Method, ids: Tensor, step: Step, work: Work) -> Rows:
        if step.phase == "prefill":
            work.captures += (count := captures.pop(0))
            begun.append(count)
        return through(self, method, ids, step, work)

    monkeypatch.setattr(Engine, "_through", recording)
    measured = measure(engine, Full(Full.Options(), engine.context), Request(ids, 3))
    assert begun == [3, 0] and measured.work.captures == 0 and len(measured.tokens) == 3
