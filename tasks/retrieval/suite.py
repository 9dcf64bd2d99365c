"""What the generated suites share: a grid of lengths, depths and repeats, and scores over lists of answers."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from harness.options import OptionSet
from tasks.base import Sample, Task, Tokenizer
from tasks.common.haystack import Draft, Hidden, fit, speeches_version

Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=512)]
Share = Annotated[float, Field(ge=0, le=1)]


class Seeds(NamedTuple):
    """What a sample's choices come from.

    Attributes:
        context: shared by all depths and suites, so that they hide their needles in the same text.
        sample: what tells the sample from others in that text.
    """

    context: str
    sample: str

    @property
    def text(self) -> int:
        """Seed of the text around the needles, below 2^32."""
        return random.Random(self.context).randrange(2**32)

    def rng(self) -> random.Random:
        """A new generator for everything else."""
        return random.Random(f"{self.context} {self.sample}")


class Suite(Task):
    """One suite of the group `retrieval`: prompts of exact length, made up from a seed, without chat template.

    A sample's `extra` says `length` (tokens asked for), `depth` (share of the text, null where the suite has none),
    `needles` (token spans [start, end) of what an answer needs) and what the suite adds.

    Attributes:
        member: its name within the group.
    """

    member: ClassVar[str]

    class Options(OptionSet):
        """How long and how often."""

        lengths: tuple[Length, ...] = Field((1024,), description="prompt lengths in tokens")
        repeats: Count = Field(4, description="samples for each length and depth")
        new_tokens: Count | None = Field(None, description="tokens to generate at most; as many as an answer takes")

    options: Options

    def longest_prompt(self) -> int:
        """The longest of the lengths asked for."""
        return max(self.options.lengths)

    def fingerprint(self) -> str:
        """Of the speeches, which most suites are made of; raises where their package is missing."""
        return speeches_version()

    def count(self) -> int:
        """The repeats of each length and depth."""
        return self.options.repeats * len(self.options.lengths) * len(self.depths())

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """All depths and lengths once, then again with other texts, names and numbers."""
        grid = product(range(self.options.repeats), self.options.lengths, self.depths())
        for repeat, length, depth in islice(grid, self.context.limit):
            yield self._sample(tokenizer, repeat, length, depth)

    def depths(self) -> Sequence[float | None]:
        """The depths of the grid; one null where there is nothing to place."""
        return (None,)

    @abstractmethod
    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """A prompt of about `target` tokens; the same choices for the same seeds.

        Raises:
            InputError: there is no room for it.
        """

    @abstractmethod
    def answer_tokens(self) -> int:
        """Tokens that an answer takes, generously."""

    def _sample(self, tokenizer: Tokenizer, repeat: int, length: int, depth: float | None) -> Sample:
        place = "" if depth is None else f"{depth:g}-"
        name = f"{length}-{place}{repeat}"
        seeds = Seeds(f"{self.context.seed} {length} {repeat}", f"{self.member} {place}")
        made = fit(tokenizer, length, lambda target: self.draft(tokenizer, target, depth or 0.0, seeds))
        return Sample(
            id=name,
            prompt=made.text,
            answers=made.draft.answers,
            max_new_tokens=self.options.new_tokens or self.answer_tokens(),
            question=made.draft.ending,
            extra=self._extra(made, length, depth),
        )

    def _extra(self, made: Hidden, length: int, depth: float | None) -> dict[str, Any]:
        return {"length": length, "depth": depth, "needles": [list(span) for span in made.spans], **made.draft.facts}


class DeepSuite(Suite):
    """A suite whose needles lie at a depth."""

    class Options(Suite.Options):
        """Where in the text, besides how long and how often."""

        depths: tuple[Share, ...] = Field(
            (0.1, 0.3, 0.5, 0.7, 0.9), description="where the needles lie, as a share of the text"
        )

    options: Options

    def depths(self) -> Sequence[float | None]:
        """The depths asked for."""
        return self.options.depths


def share_of_first(found: Iterable[str], answers: Sequence[str]) -> float:
    """Share of the wanted answers among as many distinct ones as were found first: naming everything does not help.

    With n answers wanted and f the first n distinct entries of `found`: |f and answers| / n.
    """
    wanted = set(answers)
    first = list(islice(dict.fromkeys(found), len(wanted)))
    return len(wanted.intersection(first)) / len(wanted)


def first_number(prediction: str) -> str | None:
    """The first run of digits, or None."""
    found = re.search(r"\d+", prediction)
    return found and found.group()


def numbers(prediction: str) -> list[str]:
    """All runs of digits."""
    return re.findall(r"\d+", prediction)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
