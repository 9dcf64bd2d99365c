"""Latency at fixed lengths: real text, cut to the token, and always the same number of new tokens.

Requests are sent one after the other, or arrive at a rate.

Nothing is scored, so random weights of a real shape serve as well as trained ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from typing import Annotated

from pydantic import Field

from tasks.base import DataNote, Sample, Tokenizer
from tasks.common.haystack import SPEECHES
from tasks.common.load import LoadOptions, UnderLoad
from tasks.common.texts import running_text


class Speed(UnderLoad):
    """One sample a length and repeat; every repeat has a text of its own."""

    name = "speed"
    summary = "latency at fixed prompt lengths and numbers of new tokens; nothing is scored"
    metric = "none"
    data = DataNote(licence=SPEECHES)

    class Options(LoadOptions):
        """Lengths, new tokens, repeats, and how they arrive."""

        lengths: tuple[Annotated[int, Field(ge=16)], ...] = Field((1024, 2048, 4096), description="prompt lengths")
        new_tokens: Annotated[int, Field(ge=1)] = Field(64, description="tokens to generate, end tokens or not")
        repeats: Annotated[int, Field(ge=1)] = Field(7, description="samples for each length")

    options: Options

    def longest_prompt(self) -> int:
        """The longest length and its new tokens."""
        return max(self.options.lengths) + self.options.new_tokens

    def count(self) -> int:
        """The repeats of each length."""
        return len(self.options.lengths) * self.options.repeats

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """All repeats of the first length, then of the next, so that warm-up at each length is paid once."""
        grid = product(self.options.lengths, range(self.options.repeats))
        for length, repeat in islice(grid, self.context.limit):
            ids = running_text(tokenizer, length, seed=self.context.seed + repeat)
            extra = {"length": length, "repeat": repeat}
            yield Sample(
                f"{length}-{repeat}", "", (), self.options.new_tokens, ids=tuple(ids), ignore_end=True, extra=extra
            )

    def score(self, sample: Sample, prediction: str) -> None:
        """Nothing to score."""
        return None
