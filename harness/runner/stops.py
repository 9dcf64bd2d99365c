"""Texts that end an answer: a tokenizer may write one as a token, as several, or as a part of one."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.base import Tokenizer

_SLACK = 8
"""Tokens looked at beyond those that a stop text can take: some stand for no text at all."""


class StopTexts:
    """Whether an answer holds one of its stop texts."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, least: int = 0) -> None:
        """
        Args:
            texts: each of a character or more.
            tokenizer: of the model.
            least: tokens before which no answer ends.
        """
        self._texts, self._tokenizer, self._least = tuple(texts), tokenizer, least
        # A token is a byte or more.
        self._seen = _SLACK + max((len(text.encode()) for text in texts), default=0)

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Looks at an answer that has grown by a token.

        Args:
            tokens: of the answer so far.
        """
        if not self._texts or len(tokens) < self._least:
            return False
        tail = self._tokenizer.decode(list(tokens[-self._seen :]), skip_special_tokens=True)
        return any(text in tail for text in self._texts)
