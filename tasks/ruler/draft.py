"""What one of RULER's thirteen tasks is: a way to draft a prompt of any size; and the size that fills a length."""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

from tasks.base import Tokenizer


class Ask(NamedTuple):
    """What sample is wanted.

    Attributes:
        length: tokens of prompt and answer together.
        number: of the sample, from 0.
        tokenizer: of the model.
        folder: the user's data.
    """

    length: int
    number: int
    tokenizer: Tokenizer
    folder: Path | None = None


class Draft(NamedTuple):
    """A prompt that has not been counted yet.

    Attributes:
        text: what the user says.
        question: its ending, which asks.
        prefix: the first words of the answer.
        answers: what the answer must contain.
        needles: pieces of the text, each in it once, that an answer needs; empty where that is not a few.
    """

    text: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    needles: tuple[str, ...] = ()


class Maker(ABC):
    """One of the thirteen.

    Attributes:
        new_tokens: tokens of an answer.
        metric: name of its score.
    """

    new_tokens: ClassVar[int]
    metric: ClassVar[str] = "string_match_all"

    @abstractmethod
    def draft(self, ask: Ask, size: int, rng: random.Random) -> Draft:
        """A prompt that grows with `size`, whatever the task counts; equal for equal arguments."""

    def sizes(self, folder: Path | None) -> range:
        """Sizes that make a prompt."""
        return range(1, sys.maxsize)

    def samples(self, folder: Path | None) -> int:
        """How many samples there are: as many as RULER makes, unless the data has fewer."""
        return 500

    def fingerprint(self, folder: Path | None) -> str:
        """Digest of the texts that prompts are made of; "" for none.

        Raises:
            InputError: a package or the user's data is missing or bad.
        """
        return ""


class Counted(NamedTuple):
    """A draft and its tokens.

    Attributes:
        draft: the draft.
        size: that it was made for.
        tokens: of the whole prompt, template and prefix included.
        needles: token spans [start, end) of the draft's needles.
    """

    draft: Draft
    size: int
    tokens: int
    needles: list[list[int]]


def fill(make: Callable[[int], Counted], most: int, slack: int, sizes: range, first: int) -> Counted | None:
    """Searches for the size whose prompt fills a length: bisection whose guesses are proportional.

    Args:
        make: makes and counts the prompt of a size; a larger size has more tokens, more or less.
        most: tokens that no prompt may exceed.
        slack: the search ends at a prompt that has at most so many fewer.
        sizes: among which to search.
        first: where to begin.

    Returns:
        The last prompt that fits, which is the largest; None where none does.
    """
    low, high, size, best = sizes.start - 1, sizes.stop, min(max(first, sizes.start), sizes.stop - 1), None
    while high - low > 1:
        made = make(size)
        spare = most - made.tokens
        if spare < 0:
            high = size
        else:
            low, best = size, made
            if spare <= slack:
                break
        size = max(low + 1, min(high - 1, size + size * (spare - slack // 2) // made.tokens))
    return best
