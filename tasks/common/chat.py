"""A prompt in the model's chat template, and its tokens."""

from __future__ import annotations

from typing import Any, Protocol

from harness.errors import InputError
from tasks.base import Tokenizer

# Llama 3.2's template prints today's date unless it is told one: the same prompt would differ tomorrow. This is the
# date that Llama 3.1's and 3.2's templates fall back to; other templates ignore it.
_DATE = "26 Jul 2024"

# Stand for a question and its answer, to see what a template writes behind them; no text has them.
_ASKED, _ANSWERED = "\ufdd1", "\ufdd2"


class ChatTokenizer(Tokenizer, Protocol):
    """A Hugging Face tokenizer as `wrap` uses it."""

    bos_token: str | None

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Wraps messages in the model's template; `tokenize=False` answers with text."""


def wrap(text: str, tokenizer: ChatTokenizer) -> str:
    """The text as a user's only message, followed by the opening of the answer; as it is without a template.

    Raises:
        InputError: the model's template fails.
    """
    return _rendered([{"role": "user", "content": text}], tokenizer) if tokenizer.chat_template else text


def wrap_further(text: str, tokenizer: ChatTokenizer) -> str:
    """The text as a further message of the user, as it follows the last word of an answer: with what the template ends
    an answer with, and the opening of the next one. White space around the text goes; without a template it is as is.

    Raises:
        InputError: the model's template fails, or does not show what was said before.
    """
    if not tokenizer.chat_template:
        return text
    said = zip(("user", "assistant", "user"), (_ASKED, _ANSWERED, text.strip()), strict=True)
    rendered = _rendered([{"role": role, "content": content} for role, content in said], tokenizer)
    _, found, behind = rendered.partition(_ANSWERED)
    if not found:
        raise InputError("the model's chat template shows no earlier answers, so no conversation can go on")
    return behind


def _rendered(conversation: list[dict[str, str]], tokenizer: ChatTokenizer) -> str:
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": _DATE}
    try:
        return str(tokenizer.apply_chat_template(conversation, **options))
    except Exception as error:
        raise InputError(f"the model's chat template fails: {type(error).__name__}: {error}") from error


def tokenise(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a wrapped or bare text."""
    return tokenizer.encode(text, add_special_tokens=not has_bos(text, tokenizer))


def has_bos(text: str, tokenizer: Tokenizer) -> bool:
    """Whether the text itself begins with the beginning-of-sequence token, so that it must not get a second one."""
    bos = getattr(tokenizer, "bos_token", None)
    return bool(bos) and text.startswith(str(bos))
