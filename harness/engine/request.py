"""What one generation is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.engine import promises
from harness.engine.method import Method


@dataclass(frozen=True)
class Request:
    """One prompt, and how the answer to it ends.

    Attributes:
        prompt: [n] int64 token ids on the model's device, n >= 1.
        max_new_tokens: where generation stops at the latest, >= 1.
        stop_ids: tokens that end generation (they are part of the output).
        min_new_tokens: stop tokens are suppressed before this many tokens are out.
        question: last tokens of the prompt that hold the question; 0 if that is not known.
        question_after: prefill, and prune, the context alone; the question follows in one step and is never pruned.
        follows: most tokens that come in behind the answer, where a `Session` goes on: later questions and answers.
    """

    prompt: Tensor
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    question: int = 0
    question_after: bool = False
    follows: int = 0

    def __post_init__(self) -> None:
        if self.prompt.numel() < 1:
            raise ValueError("the prompt is empty")
        if not 0 <= self.question < self.prompt.numel():
            raise ValueError(f"a question of {self.question} tokens leaves no context")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    @property
    def to_come(self) -> int:
        """Most tokens that come in behind the prompt."""
        return self.max_new_tokens + self.follows

    def suppressed(self, number: int) -> frozenset[int]:
        """Tokens that may not be the `number`-th new one, counted from 1."""
        return self.stop_ids if number <= self.min_new_tokens else frozenset()

    def late_tokens(self, method: Method) -> int:
        """Last tokens of the prompt that follow the prefill: its question, if protocol or method want that."""
        if self.question_after:
            return self.question
        length = len(self.prompt)
        return promises.late_tokens(method.question_tokens(length, self.question), length)
