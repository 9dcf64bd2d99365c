"""A prompt in the model's chat template, and its tokens."""

from __future__ import annotations

from typing import Any, Protocol

from harness.errors import InputError
from tasks.base import Tokenizer

# Llama 3.2's template prints today's date unless it is told one: the same prompt would differ tomorrow. This is the
# date that Llama 3.1's and 3.2's templates fall back to; other templates ignore it.
_DATE = "26 Jul 2024"


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
    if not tokenizer.chat_template:
        return text
    conversation = [{"role": "user", "content": text}]
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
