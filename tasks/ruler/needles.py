"""The eight needle tasks: sentences that give a key a value, hidden in noise, in essays, or among others of their kind.

Wordings and settings are RULER's (NVIDIA/RULER, `synthetic/niah.py`, `synthetic.yaml`). Essays are cut into sentences
by their punctuation, where RULER takes nltk's trained splitter.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Literal
from uuid import UUID

from tasks.ruler.corpora import essay_words, words
from tasks.ruler.draft import Ask, Draft, Maker

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

NEEDLE = "One of the special magic {kind} for {key} is: {value}."

OPENING = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION = "\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"
ONE = {"some": "A", "are": "is", "are_all": "is"}
SEVERAL = {"some": "Some", "are": "are", "are_all": "are all"}

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the sentences that may stand before a needle: 40, evenly spread."""

Kind = Literal["words", "numbers", "uuids"]


def _word(rng: random.Random) -> str:
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


_DRAW: dict[Kind, Callable[[random.Random], str]] = {
    "words": _word,
    "numbers": lambda rng: str(rng.randrange(10**6, 10**7)),
    "uuids": lambda rng: str(UUID(int=rng.getrandbits(128), version=4)),
}


@dataclass(frozen=True)
class Needles(Maker):
    """One of the eight; its size counts lines of the haystack, or words of the essays.

    Attributes:
        haystack: noise, essays, or needles with other keys.
        key: what a key is.
        value: what a value is.
        keys: how many there are.
        values: each key has.
        asked: keys asked for.
    """

    new_tokens = 128

    haystack: Literal["noise", "essays", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def draft(self, ask: Ask, size: int, rng: random.Random) -> Draft:
        """The needles at random places of the haystack; several values are asked for at once."""
        found = {key: _distinct(self.value, self.values, rng) for key in _distinct(self.key, self.keys, rng)}
        needles = {self._needle(key, value): key for key, values in found.items() for value in values}
        text = self._hide(rng.sample(list(needles), len(needles)), size, rng)
        asked = rng.sample(list(found), self.asked)
        question, prefix = self._question(asked)
        return Draft(
            text=self._form(OPENING) + text + question,
            question=question,
            prefix=prefix,
            answers=tuple(value for key in asked for value in found[key]),
            needles=tuple(needle for needle, key in needles.items() if key in asked),
        )

    def sizes(self, folder: Path | None) -> range:
        """Enough lines to stand between."""
        return range(self.keys * self.values, super().sizes(folder).stop)

    def fingerprint(self, folder: Path | None) -> str:
        """Of the words and essays that are needed; raises where their packages are missing."""
        used: list[Sequence[str]] = [essay_words()] if self.haystack == "essays" else []
        used += [words("adjective"), words("noun")] if self.key == "words" else []
        return hashlib.sha256(repr(used).encode()).hexdigest()[:16]

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def _hide(self, needles: Sequence[str], size: int, rng: random.Random) -> str:
        if self.haystack == "essays":
            return _among_sentences(needles, size, rng)
        lines = [NOISE if self.haystack == "noise" else self._other(rng) for _ in range(size)]
        for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _other(self, rng: random.Random) -> str:
        return self._needle(_DRAW[self.key](rng), _DRAW[self.value](rng))

    def _question(self, asked: Sequence[str]) -> tuple[str, str]:
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        return self._form(QUESTION, query), self._form(PREFIX, query)

    def _form(self, template: str, query: str = "") -> str:
        """Singular where one value is asked for."""
        one = self.asked * self.values == 1
        return template.format(kind=self.value[:-1] if one else self.value, query=query, **(ONE if one else SEVERAL))


def _distinct(kind: Kind, count: int, rng: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_DRAW[kind](rng)] = None
    return list(drawn)


def _among_sentences(needles: Sequence[str], size: int, rng: random.Random) -> str:
    """The first `size` words of the essays, over again where they end, with the needles between sentences."""
    sentences = re.split(r"(?<=[.!?]) ", " ".join(_first(essay_words(), size)))
    places = sorted(len(sentences) * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
    parts = [" ".join(sentences[start:end]) for start, end in pairwise([0, *places, len(sentences)])]
    mixed = [piece for pair in zip(parts, [*needles, ""], strict=True) for piece in pair]
    return " ".join(filter(None, mixed))


def _first(items: Iterable[str], count: int) -> Iterable[str]:
    return islice(cycle(items), count)
