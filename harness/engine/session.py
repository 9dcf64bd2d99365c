"""Several requests over one cache: a conversation about a context that is read, and pruned, once.

The first request prefills. What a later one brings in, its question and what parts it from the answer before, comes in
as decode rows behind all that the caches hold, as a question behind its context does: nothing is prefilled again, and
what a method has dropped stays dropped unless its decode brings it back.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.engine.engine import Engine
from harness.engine.generation import Generation
from harness.engine.method import Method
from harness.engine.request import Request


class Session:
    """One conversation under one method, which serves nothing else until it is over.

    Attributes:
        later: a turn behind the first one was asked.
    """

    def __init__(self, engine: Engine, method: Method) -> None:
        """
        Args:
            engine: on the model.
            method: begins anew with the first request.
        """
        self._engine, self._method = engine, method
        self._request: Request | None = None
        self._answer: Generation | None = None
        self._left, self.later = 0, False

    def stream(self, request: Request, *, eager: bool = False) -> Generation:
        """Generates the next answer, as `Engine.stream`.

        A stop token that an answer ends with does not stay in the conversation: whoever asks on says what parts the
        next question from the answer.

        Args:
            request: of the first turn the whole prompt, and in `follows` all that later ones may bring; of a later one
                what is new in it. An answer that was begun before is over.
            eager: as `Engine.stream` takes it.

        Raises:
            ValueError: it brings more tokens than the first request spoke of.
        """
        if self._answer is None:
            self._left = request.follows
            answer = self._engine.stream(self._method, request, eager=eager)
        else:
            self.later, answer = True, self._go_on(self._answer, request, eager)
        self._request, self._answer = request, answer
        return answer

    def forget(self) -> None:
        """The first request was only begun, and is begun anew: the next `stream` is the first again.

        Raises:
            ValueError: a later turn was asked, which would be lost.
        """
        if self.later:
            raise ValueError("only the first turn of a session can begin anew")
        if self._answer is not None:
            self._answer.close()
        self._request = self._answer = None

    def said(self) -> list[int]:
        """What stays in the conversation of the last answer: all of it but a stop token at its end."""
        assert self._request is not None and self._answer is not None
        tokens = self._answer.tokens
        return tokens[:-1] if tokens[-1] in self._request.stop_ids else tokens

    def _go_on(self, before: Generation, request: Request, eager: bool) -> Generation:
        before.close()
        self._left -= len(request.prompt) + request.max_new_tokens
        if self._left < 0:
            raise ValueError("a later turn brings more tokens than the first one spoke of")
        # The caches hold all of an answer but its last token, which nothing has followed yet.
        held = len(before.tokens) - 1
        ids = torch.cat((request.prompt.new_tensor(self.said()[held:]), request.prompt))
        return self._engine.go_on(
            self._method, replace(request, prompt=ids, question=0), before.work.start + held, eager=eager
        )
