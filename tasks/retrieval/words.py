"""Words to be counted: a few occur often among many that do not. What an answer needs lies everywhere, so there is no
depth, and `needles` holds at most 256 of the asked words' occurrences, evenly chosen.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, count, islice
from typing import Annotated, ClassVar

from pydantic import Field

from harness.errors import InputError
from tasks.base import Sample, Tokenizer
from tasks.common.haystack import Draft, Span, speeches
from tasks.retrieval.suite import Seeds, Suite, share_of_first

MOST_SPANS = 256


class WordSuite(Suite):
    """Asks for the most frequent words of a list."""

    opening: ClassVar[str] = "A list of words:\n\n"
    metric = "share_of_first_n"

    class Options(Suite.Options):
        """How many words are asked for."""

        asked: Annotated[int, Field(ge=1, le=20)] = Field(5, description="most frequent words asked for")

    options: Options

    def words(self, size: int, rng: random.Random) -> list[str]:
        """About `size` words, the frequent ones not yet in place."""
        raise NotImplementedError

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """The list, cut to the length, and the question; the answers are counted after the cut."""
        ending = f"\n\nThe {self.options.asked} words that occur most often in the list above:\n1."
        room = target - len(tokenizer.encode(self.opening + ending))
        listed = _cut(tokenizer, self._shuffled(tokenizer, room, seeds), room)
        answers = _most_frequent(listed, self.options.asked)
        places = _occurrences(listed, set(answers), len(self.opening))
        text = self.opening + " ".join(listed) + ending
        return Draft(text, ending, answers, places, {"words": len(listed)})

    def _shuffled(self, tokenizer: Tokenizer, room: int, seeds: Seeds) -> list[str]:
        """A few words more than fit into `room` tokens."""
        probe = self.words(400, seeds.rng())
        tokens_a_word = len(tokenizer.encode(" ".join(probe), add_special_tokens=False)) / len(probe)
        rng = seeds.rng()
        words = self.words(int(1.1 * room / tokens_a_word) + 8, rng)
        rng.shuffle(words)
        return words

    def answer_tokens(self) -> int:
        """The words."""
        return 8 * self.options.asked

    def score(self, sample: Sample, prediction: str) -> float:
        """Share of the wanted words among the first distinct ones of five letters or more, see `share_of_first`."""
        return share_of_first(re.findall(r"[a-z]{5,}", prediction.lower()), sample.answers)


class CommonWords(WordSuite):
    """Words of the speeches: the common ones occur ten times as often as the others."""

    member: ClassVar[str] = "common-words"
    summary: ClassVar[str] = "a list of words in which a few occur often; share found among the first n words"

    def words(self, size: int, rng: random.Random) -> list[str]:
        """Common words up to 30 times (about 40 % of a short list, less of a long one), others a tenth as often."""
        asked = self.options.asked
        vocabulary = rng.sample(lexicon(), len(lexicon()))
        others = vocabulary[asked:]
        often = max(4, min(30, int(0.4 * size / asked)))
        rest = size - often * asked
        rarely = max(1, often // 10, -(-rest // len(others)))
        return vocabulary[:asked] * max(often, 10 * rarely) + others[: -(-rest // rarely)] * rarely


class FrequentWords(WordSuite):
    """Made-up words whose frequencies fall with the square of their rank (a zeta distribution)."""

    member: ClassVar[str] = "frequent-words"
    summary: ClassVar[str] = "made-up words with zeta frequencies; share of the most frequent among the first n words"

    class Options(WordSuite.Options):
        """How many words are asked for; frequencies get close to each other beyond a few."""

        asked: Annotated[int, Field(ge=1, le=5)] = Field(3, description="most frequent words asked for")

    options: Options

    def fingerprint(self) -> str:
        """Nothing: the words are made up."""
        return ""

    def words(self, size: int, rng: random.Random) -> list[str]:
        """The word of rank k occurs size / (k^2 * zeta(2)) times, rounded up, until the list is full."""
        counts = (-(-size * 6 // (10 * rank * rank)) for rank in count(1))
        repeated = (word for word, times in zip(invented(rng), counts, strict=False) for _ in range(times))
        return list(islice(repeated, size))


@cache
def lexicon() -> tuple[str, ...]:
    """Lower-case words of five to nine letters that occur in at least three speeches, sorted."""
    seen = Counter(word for text in speeches() for word in set(re.findall(r"\b[a-z]{5,9}\b", text)))
    return tuple(sorted(word for word, documents in seen.items() if documents >= 3))


def invented(rng: random.Random) -> Iterator[str]:
    """Distinct words of three open syllables."""
    known = set()
    while True:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in known:
            known.add(word)
            yield word


def _cut(tokenizer: Tokenizer, words: Sequence[str], tokens: int) -> list[str]:
    """The first words that fill `tokens` tokens."""
    ids = tokenizer.encode(" ".join(words), add_special_tokens=False)[: max(tokens, 0)]
    kept = len(tokenizer.decode(ids, skip_special_tokens=True).split())
    return list(words[: max(kept - 1, 1)])


def _most_frequent(words: Iterable[str], asked: int) -> tuple[str, ...]:
    """The most frequent words.

    Raises:
        InputError: the next one occurs as often, because the list is too short.
    """
    ranked = Counter(words).most_common(asked + 1)
    if len(ranked) <= asked or ranked[asked - 1][1] == ranked[asked][1]:
        raise InputError(f"a list this short has no {asked} most frequent words; ask for longer prompts")
    return tuple(word for word, _ in ranked[:asked])


def _occurrences(words: Sequence[str], wanted: set[str], offset: int) -> list[Span]:
    """Characters of the wanted words in the list joined by spaces, at most `MOST_SPANS`, evenly chosen."""
    starts = accumulate((len(word) + 1 for word in words), initial=offset)
    found = [(start, start + len(word)) for start, word in zip(starts, words, strict=False) if word in wanted]
    step = max(1, -(-len(found) // MOST_SPANS))
    return found[::step]
