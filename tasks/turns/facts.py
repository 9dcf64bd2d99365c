"""Secret numbers of several places in one speech, asked for one after the other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from tasks.base import DataNote, Sample, Tokenizer
from tasks.common.haystack import SPEECHES, Draft, fit, hidden_draft, speeches_version
from tasks.needle import PLACES
from tasks.retrieval.needles import TOKENS_PER_NUMBER, around, secret
from tasks.retrieval.suite import Length, first_number
from tasks.turns.conversation import Conversations, context_hash, turn_id


class Facts(Conversations):
    """The numbers lie evenly over the speech; over `turns` contexts each turn asks once at each depth."""

    member: ClassVar[str] = "facts"
    summary: ClassVar[str] = "numbers of several places in one speech, asked one after the other; first number"
    metric = "exact_match"
    data = DataNote(licence=SPEECHES)

    class Options(Conversations.Options):
        """How many questions, how long, how often, and how many numbers nobody asks for."""

        turns: Annotated[int, Field(ge=2)] = Field(4, description="questions about a context")
        lengths: tuple[Length, ...] = Field((1024,), description="tokens of the context and its first question")
        repeats: Annotated[int, Field(ge=1)] = Field(8, description="contexts of each length")
        others: Annotated[int, Field(ge=0)] = Field(0, description="places whose numbers nobody asks for")
        new_tokens: Annotated[int, Field(ge=1)] = Field(TOKENS_PER_NUMBER, description="tokens of an answer at most")

        @model_validator(mode="after")
        def _enough_places(self) -> Facts.Options:
            if self.turns + self.others > len(PLACES):
                raise ValueError(f"turns and others are more than the {len(PLACES)} places that there are")
            return self

    options: Options

    def longest_prompt(self) -> int:
        """The longest of the lengths asked for."""
        return max(self.options.lengths)

    def fingerprint(self) -> str:
        """Of the speeches; raises where their package is missing."""
        return speeches_version()

    def count(self) -> int:
        """The contexts, each of which is one sample with follow-ups."""
        return len(self.options.lengths) * self.options.repeats

    def contexts(self, tokenizer: Tokenizer) -> Iterator[Sequence[Sample]]:
        """All lengths once, then again with other speeches, places and numbers."""
        for repeat in range(self.options.repeats):
            for length in self.options.lengths:
                yield self._asked(tokenizer, length, repeat)

    def _asked(self, tokenizer: Tokenizer, length: int, repeat: int) -> list[Sample]:
        name, turns = f"{length}-{repeat}", self.options.turns
        rng = random.Random(f"{self.context.seed} turns {name}")
        places = rng.sample(PLACES, turns + self.options.others)
        numbers = [str(number) for number in rng.sample(range(10000, 100000), len(places))]
        depths = self._depths(repeat) + [rng.random() for _ in range(self.options.others)]
        told = {secret(*pair): depth for *pair, depth in zip(places, numbers, depths, strict=True)}
        endings, seed = list(map(question, places[:turns])), rng.randrange(2**32)

        def draft(target: int) -> Draft:
            return hidden_draft(tokenizer, target, told, endings[0], seed)

        made = fit(tokenizer, length, draft)
        text = made.text.removesuffix(endings[0])
        shared = {"length": length, "context_hash": context_hash(text)}
        return [
            Sample(
                id=turn_id(name, turn + 1),
                prompt=text + ending,
                answers=(numbers[turn],),
                max_new_tokens=self.options.new_tokens,
                question=ending,
                extra={**shared, "depth": depths[turn], "needles": [list(made.spans[turn])]},
            )
            for turn, ending in enumerate(endings)
        ]

    def _depths(self, repeat: int) -> list[float]:
        """Of the number that each turn asks for: a round of one order of the depths, begun at another every time."""
        depths, (order, begin) = around(0.5, 1.0, self.options.turns), divmod(repeat, self.options.turns)
        random.Random(f"{self.context.seed} turns {order}").shuffle(depths)
        return depths[begin:] + depths[:begin]

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if the first number of the answer is the one asked for."""
        return float(first_number(prediction) in sample.answers)


def question(place: str) -> str:
    """What asks for the number of a place, in the words that told it: the answer goes on from there."""
    return f"\n\nThe secret number of {place} is"
