"""The questions of one sample, asked one after the other over one cache; most samples have just one.

A record is made of each, and stored, the moment it is there. A conversation that was interrupted is begun again from
its first question: decoding is greedy, so the turns that are recorded come out as they did, and are asked unrecorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from harness.engine.session import Session
from harness.runner.loaded import Cell
from harness.runner.records import unanswered
from harness.runner.request import Bench, run_request
from harness.runner.samples import Prompt
from harness.storage.record import FAILED, OUT_OF_MEMORY, Record


class Conversation:
    """One method asked the questions of one sample."""

    def __init__(self, bench: Bench, cell: Cell, prompt: Prompt, before: Callable[[], None]) -> None:
        """
        Args:
            bench: the run.
            cell: that is asked.
            prompt: what it is asked.
            before: is called ahead of the first question.
        """
        self._bench, self._cell, self._before = bench, cell, before
        self._turns = iter((prompt, *prompt.later))
        self._session: Session | None = None
        self._asked = self._tokens = self._recomputed = 0
        self._context: int | None = None
        self._ended: tuple[str, str] | None = None

    def record(self, number: int, *, last: bool) -> Record:
        """Asks a question, and first those ahead of it that were not asked yet.

        Args:
            number: of the question, from 0; ascending from call to call.
            last: none is asked behind it.

        Raises:
            InputError: as `run_request`.
        """
        while self._asked < number:
            self._next(last=False)
        record = self._next(last=last)
        if last:
            self._session = None  # and with it token ids on the device
        return record

    def _next(self, *, last: bool) -> Record:
        prompt = self._placed(next(self._turns))
        self._asked += 1
        if self._ended is not None:
            return unanswered(self._cell, prompt, self._bench.run.model.shape, *self._ended)
        if self._session is None:
            self._before()
            self._session = Session(self._bench.run.engine, self._cell.method)
        there = prompt.on(self._bench.run.device)
        record = run_request(self._bench, self._cell, there, self._session, last=last)
        return self._noted(record, prompt, self._session)

    def _placed(self, prompt: Prompt) -> Prompt:
        """The prompt, with what is known by now of where it stands."""
        if prompt.turn is None:
            return prompt
        return replace(prompt, turn=replace(prompt.turn, behind=self._tokens, context=self._context))

    def _noted(self, record: Record, prompt: Prompt, session: Session) -> Record:
        """The record of this turn alone, of what the method counts since it began; what comes next builds on it."""
        self._context, self._ended = record.context_tokens, _without_answer(record)
        self._tokens += len(prompt.request.prompt)
        if self._ended is not None:
            return record
        self._tokens += len(session.said())
        before, self._recomputed = self._recomputed, record.tokens_recomputed
        return record.model_copy(update={"tokens_recomputed": record.tokens_recomputed - before})


def _without_answer(record: Record) -> tuple[str, str] | None:
    """Why a request has no answer, as `unanswered` takes it: the conversation ends there."""
    return next(((fact, record.extra[fact]) for fact in (OUT_OF_MEMORY, FAILED) if fact in record.extra), None)
