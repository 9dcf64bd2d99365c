"""Words to be counted: the ten most common of a list, the three most frequent of a coded text.

Wordings and settings are RULER's (NVIDIA/RULER, `synthetic/common_words_extraction.py`, `freq_words_extraction.py`).
"""

from __future__ import annotations

import hashlib
import random
import string
from pathlib import Path

from scipy.special import zeta

from tasks.ruler.corpora import all_words, dictionary
from tasks.ruler.draft import Ask, Draft, Maker

LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
LIST_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10

CODE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
CODE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
EXPONENT = 2.0
LETTERS = 6


class CommonWords(Maker):
    """Ten words occur thirty times, the others three times; its size counts different words.

    Below 4096 tokens it is six times and once. The worked example stands in the user's turn, where RULER gives it a
    turn of its own for models with a chat template.
    """

    new_tokens = 120

    def draft(self, ask: Ask, size: int, rng: random.Random) -> Draft:
        """A short list with its answer, then the list."""
        short = ask.length < 4096
        shown, answer = _numbered(*((20, 3, 1) if short else (40, 10, 3)), rng)
        asked, common = _numbered(size, *((6, 1) if short else (30, 3)), rng)
        example = LIST + shown + LIST_QUESTION + LIST_PREFIX + _enumerated(answer)
        return Draft(f"{example}\n{LIST}{asked}{LIST_QUESTION}", LIST_QUESTION, LIST_PREFIX, tuple(common))

    def sizes(self, folder: Path | None) -> range:
        """More than the common ones."""
        return range(COMMON + 1, len(dictionary()))

    def fingerprint(self, folder: Path | None) -> str:
        """Of the words; raises where their packages are missing."""
        return hashlib.sha256(repr([all_words(), len(dictionary())]).encode()).hexdigest()[:16]


class FrequentWords(Maker):
    """Frequencies fall as 1/rank^2, and the first rank is dots; its size counts words of the text."""

    new_tokens = 50

    def draft(self, ask: Ask, size: int, rng: random.Random) -> Draft:
        """The word of rank k occurs size / (k^2 * zeta(2)) times, rounded down."""
        ranked = ["...", *_coded(ask.length // 50, rng)[1:]]
        share = float(zeta(EXPONENT))
        counts = [int(size * rank**-EXPONENT / share) for rank in range(1, len(ranked) + 1)]
        text = [word for word, times in zip(ranked, counts, strict=True) for _ in range(times)]
        rng.shuffle(text)
        return Draft(CODE + " ".join(text) + CODE_QUESTION, CODE_QUESTION, CODE_PREFIX, tuple(ranked[1:4]))

    def sizes(self, folder: Path | None) -> range:
        """Long enough for the fourth rank to be ahead of the fifth."""
        return range(100, super().sizes(folder).stop)


def _numbered(size: int, often: int, rarely: int, rng: random.Random) -> tuple[str, list[str]]:
    """A numbered list of `size` different words, and the first ten of them, which occur `often`."""
    vocabulary = all_words() if size <= len(all_words()) else dictionary()
    drawn = rng.sample(vocabulary, size)
    listed = drawn[:COMMON] * often + drawn[COMMON:] * rarely
    rng.shuffle(listed)
    return _enumerated(listed), drawn[:COMMON]


def _enumerated(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _coded(count: int, rng: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    return list(drawn)
