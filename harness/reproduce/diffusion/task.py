"""The prompts of the diffusion probe: a three-digit number in a long speech, and where everything is in tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice, product
from typing import Annotated

from pydantic import Field

from harness.options import OptionSet
from tasks.base import Sample, Task, Tokenizer
from tasks.common.haystack import TokenMap, hide
from tasks.needle import PLACES


class DiffusionNeedle(Task):
    """One number a prompt, asked for at the end. Not listed: its records come from the probe's own loop.

    A sample's `extra` says `length`, `depth`, `needles` (the sentence's span, in tokens) and `number` (the span of the
    number in it); its only choice is the answer as it would follow the prompt.
    """

    name = "diffusion"
    summary = "a three-digit number hidden in presidential speeches, for the diffusion probe"
    metric = "greedy_match"

    class Options(OptionSet):
        """Lengths in tokens of the model at hand, depths from 0 to 1."""

        lengths: tuple[Annotated[int, Field(ge=192)], ...] = Field((1024,), description="prompt lengths in tokens")
        depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
            (0.1, 0.3, 0.5, 0.7, 0.9), description="where the needle lies, as a share of the speech"
        )
        repeats: Annotated[int, Field(ge=1)] = Field(4, description="samples for each length and depth")

    options: Options

    def longest_prompt(self) -> int:
        """The longest of the lengths asked for."""
        return max(self.options.lengths)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """All depths once, then again with other speeches, places and numbers."""
        grid = product(range(self.options.repeats), self.options.lengths, self.options.depths)
        for repeat, length, depth in islice(grid, self.context.limit):
            yield self._sample(tokenizer, repeat, length, depth)

    def _sample(self, tokenizer: Tokenizer, repeat: int, length: int, depth: float) -> Sample:
        name = f"{length}-{depth:g}-{repeat}"
        rng = random.Random(f"diffusion {self.context.seed} {name}")
        place, number = rng.choice(PLACES), str(rng.randrange(100, 1000))
        needle = f"The secret number of {place} is {number}."
        ending = f"\n\nThe secret number of {place} that is mentioned in the text above is"
        hidden = hide(tokenizer, length, {needle: depth}, ending, rng.randrange(2**32))
        start = hidden.text.index(needle) + needle.rindex(number)
        span = TokenMap(tokenizer, hidden.text).span(start, start + len(number))
        extra = {"length": length, "depth": depth, "needles": [list(hidden.spans[0])], "number": list(span)}
        return Sample(name, hidden.text, (number,), 1, question=ending, choices=(f" {number}",), extra=extra)

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if the number is what greedy decoding writes."""
        return float(prediction.strip() == sample.answers[0])
