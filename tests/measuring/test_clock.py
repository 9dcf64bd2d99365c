"""Peak memory of one request in a process that has served others."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.generation import Generation, Work
from harness.engine.method import Method
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.request import Request
from harness.engine.session import Session
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


def captured(monkeypatch: pytest.MonkeyPatch, captures: list[int]) -> list[int]:
    """Has prefills say that they recorded something, one after the other; returns what they said so far."""
    begun: list[int] = []
    through = Engine._through

    def recording(self: Engine, method: Method, ids: Tensor, step: Step, work: Work) -> Rows:
        if step.phase == "prefill":
            work.captures += (count := captures.pop(0))
            begun.append(count)
        return through(self, method, ids, step, work)

    monkeypatch.setattr(Engine, "_through", recording)
    return begun


def test_a_prefill_that_is_recorded_on_the_way_is_not_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids, begun = tiny_engine(), random_ids(50), captured(monkeypatch, [3, 0])
    measured = measure(engine, Full(Full.Options(), engine.context), Request(ids, 3))
    assert begun == [3, 0] and measured.work.captures == 0 and len(measured.tokens) == 3


def test_nor_is_an_answer_whose_steps_are_recorded_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = tiny_engine(), random_ids(50)
    method = Full(Full.Options(), engine.context)
    asked: list[Generation] = []
    recorded = cast(RecordedDecode, SimpleNamespace(anew=True, overlap=None))
    stream = Engine.stream

    def recording(self: Engine, *args: Any, **named: Any) -> Generation:
        answer = stream(self, *args, **named)
        recorded.anew = len(asked) != 1
        asked.append(answer)
        answer.work.recorded = recorded
        return answer

    monkeypatch.setattr(Engine, "stream", recording)
    for session in (None, Session(engine, method)):
        asked.clear()
        measured = measure(engine, method, Request(ids, 3), session=session)
        assert len(asked) == 2 and not measured.cold and len(measured.tokens) == 3
    # What is recorded for every request is asked twice, not for ever.
    assert measure(engine, method, Request(ids, 3)).cold and len(asked) == 4


def test_nor_is_that_of_a_session_whose_later_turns_have_none() -> None:
    engine, ids, more = tiny_engine(), random_ids(50), random_ids(57)[50:]
    requests = [Request(ids, 3, follows=10), Request(more, 3)]
    said = []
    for captures in ([3, 0], [0]):
        method = Full(Full.Options(), engine.context)
        session = Session(engine, method)
        with pytest.MonkeyPatch.context() as patch:
            begun = captured(patch, list(captures))
            measured = [measure(engine, method, request, session=session) for request in requests]
        said.append([one.tokens for one in measured])
        assert begun == captures and not measured[1].work.projected and method.cache[0].length == 50 + 3 + 7 + 2
    assert said[0] == said[1]
    with pytest.raises(ValueError, match="only the first turn"):
        session.forget()
