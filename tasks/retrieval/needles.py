"""Several needles in a speech: one of many keys, all values of a key, several keys, and names that stand for names.

Where all needles are asked for they lie at even distances in a window of `spread` around the depth; needles that only
distract lie anywhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from tasks.base import Sample, Tokenizer
from tasks.common.haystack import Draft, hidden_draft
from tasks.needle import PLACES
from tasks.retrieval.suite import DeepSuite, Seeds, Share, first_number, listed, numbers, share_of_first

# None of them occurs in the speeches.
CODE_NAMES = (
    "Agate", "Beryl", "Cobalt", "Dolomite", "Feldspar", "Garnet", "Hematite", "Jasper", "Kunzite", "Larimar",
    "Moonstone", "Nephrite", "Obsidian", "Peridot", "Rhodonite", "Spinel", "Topaz", "Unakite", "Wulfenite", "Zircon",
)  # fmt: skip

TOKENS_PER_NUMBER, TOKENS_PER_SENTENCE = 10, 20

_Several = Annotated[int, Field(ge=1, le=len(PLACES))]
_Spread = Annotated[Share, Field(description="share of the text over which the needles are spread")]


def secret(place: str, number: str) -> str:
    """The needle's sentence."""
    return f"The secret number of {place} is {number}."


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10000, 100000), count)]


def around(depth: float, spread: float, count: int) -> list[float]:
    """`count` ascending depths, evenly spaced in a window of `spread` around `depth`, moved to lie within 0 to 1."""
    low = min(max(0.0, depth - spread / 2), 1 - spread)
    return [low + spread * (number + 0.5) / count for number in range(count)]


class MultiKey(DeepSuite):
    """Many keys with a number each; one is asked for, at the depth; the others lie anywhere."""

    member: ClassVar[str] = "multikey"
    summary: ClassVar[str] = "numbers of several places, one asked for; exact match of the first number"
    metric = "exact_match"

    class Options(DeepSuite.Options):
        """How many keys there are."""

        keys: _Several = Field(4, description="places that have a number, the one asked for included")

    options: Options

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """Speech with one sentence a place; only the asked one is a place that an answer needs."""
        rng = seeds.rng()
        keys = rng.sample(PLACES, self.options.keys)
        values = _numbers(rng, len(keys))
        needles = {secret(*pair): rng.random() for pair in zip(keys, values, strict=True)}
        needles[secret(keys[0], values[0])] = depth
        ending = f"\n\nThe secret number of {keys[0]} that is mentioned in the text above is"
        draft = hidden_draft(tokenizer, target, needles, ending, seeds.text)
        return replace(draft, answers=(values[0],), places=draft.places[:1])

    def answer_tokens(self) -> int:
        """One number."""
        return TOKENS_PER_NUMBER

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if the first number of the answer is the one asked for."""
        return float(first_number(prediction) in sample.answers)


class MultiValue(DeepSuite):
    """One key with several numbers, all asked for."""

    member: ClassVar[str] = "multivalue"
    summary: ClassVar[str] = "several numbers of one place, all asked for; share found among the first n numbers"
    metric = "share_of_first_n"

    class Options(DeepSuite.Options):
        """How many numbers, and how far apart."""

        values: Annotated[int, Field(ge=2, le=50)] = Field(4, description="numbers of the place")
        spread: _Spread = 0.2

    options: Options

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """Speech with one sentence a number."""
        rng = seeds.rng()
        place, values = rng.choice(PLACES), _numbers(rng, self.options.values)
        told = [f"One of the secret numbers of {place} is {value}." for value in values]
        needles = dict(zip(told, around(depth, self.options.spread, len(told)), strict=True))
        ending = (
            f"\n\nThe text above mentions {len(values)} secret numbers of {place}. Here are all of them. "
            f"One of the secret numbers of {place} is"
        )
        draft = hidden_draft(tokenizer, target, needles, ending, seeds.text)
        return replace(draft, answers=tuple(values))

    def answer_tokens(self) -> int:
        """All numbers, each in a sentence like those of the text."""
        return TOKENS_PER_SENTENCE * self.options.values

    def score(self, sample: Sample, prediction: str) -> float:
        """Share of the wanted numbers among the first distinct ones, see `share_of_first`."""
        return share_of_first(numbers(prediction), sample.answers)


class MultiQuery(DeepSuite):
    """Many keys with a number each; several are asked for, around the depth; the others lie anywhere."""

    member: ClassVar[str] = "multiquery"
    summary: ClassVar[str] = "numbers of several places, some asked for; share found among the first n numbers"
    metric = "share_of_first_n"

    class Options(DeepSuite.Options):
        """How many keys, how many of them asked for, and how far apart."""

        keys: _Several = Field(6, description="places that have a number, those asked for included")
        asked: _Several = Field(3, description="places asked for; all of them where there are fewer")
        spread: _Spread = 0.2

    options: Options

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """Speech with one sentence a place; those asked for come first among the places."""
        rng = seeds.rng()
        keys = rng.sample(PLACES, self.options.keys)
        values = _numbers(rng, len(keys))
        asked = keys[: self.options.asked]
        depths = [*around(depth, self.options.spread, len(asked)), *(rng.random() for _ in keys[len(asked) :])]
        needles = {secret(key, value): at for key, value, at in zip(keys, values, depths, strict=True)}
        ending = (
            f"\n\nThe text above mentions the secret numbers of {listed(asked)}. Here they are again. "
            f"The secret number of {asked[0]} is"
        )
        draft = hidden_draft(tokenizer, target, needles, ending, seeds.text)
        return replace(draft, answers=tuple(values[: len(asked)]), places=draft.places[: len(asked)])

    def answer_tokens(self) -> int:
        """All numbers, each in a sentence like those of the text."""
        return TOKENS_PER_SENTENCE * self.options.asked

    def score(self, sample: Sample, prediction: str) -> float:
        """Share of the wanted numbers among the first distinct ones, see `share_of_first`."""
        return share_of_first(numbers(prediction), sample.answers)


class Tracking(DeepSuite):
    """Names that stand for numbers or for other names: which of them stand for this number in the end?"""

    member: ClassVar[str] = "tracking"
    summary: ClassVar[str] = "chains of code names; share of those that stand for a number among the first n named"
    metric = "share_of_first_n"

    class Options(DeepSuite.Options):
        """How long the chains are, how many, and how far apart their links."""

        hops: Annotated[int, Field(ge=1, le=9)] = Field(3, description="links of a chain; it has one name more")
        chains: Annotated[int, Field(ge=1, le=2)] = Field(2, description="chains, the one asked for included")
        spread: _Spread = 0.2

    options: Options

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """Speech with one sentence a link; the chain asked for lies around the depth, the other anywhere, in order."""
        rng = seeds.rng()
        size = self.options.hops + 1
        names = rng.sample(CODE_NAMES, size * self.options.chains)
        values = _numbers(rng, self.options.chains)
        needles = dict(zip(chain(names[:size], values[0]), around(depth, self.options.spread, size), strict=True))
        for value in values[1:]:
            places = sorted(rng.random() for _ in range(size))
            needles |= dict(zip(chain(names[size:], value), places, strict=True))
        ending = f"\n\nThe {size} code names in the text above that stand for the number {values[0]} are"
        draft = hidden_draft(tokenizer, target, needles, ending, seeds.text)
        return replace(draft, answers=tuple(names[:size]), places=draft.places[:size])

    def answer_tokens(self) -> int:
        """All names, each in a sentence like those of the text."""
        return TOKENS_PER_SENTENCE * (self.options.hops + 1)

    def score(self, sample: Sample, prediction: str) -> float:
        """Share of the wanted names among the first distinct code names, see `share_of_first`."""
        found = re.findall(rf"\b(?:{'|'.join(CODE_NAMES)})\b", prediction)
        return share_of_first(found, sample.answers)


def chain(names: Sequence[str], value: str) -> list[str]:
    """Sentences that give the first name the value, and each further one the value of the name before it."""
    first = f"The code name {names[0]} stands for the number {value}."
    links = zip(names, names[1:], strict=False)
    return [first, *(f"The code name {new} stands for the same number as {old}." for old, new in links)]
