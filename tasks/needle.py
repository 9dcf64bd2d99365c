"""A number hidden in a long speech, asked for at the end: does the method keep what the answer needs?

A raw completion prompt without chat template, so that base models and the smallest instruct models can answer it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import islice, product
from typing import Annotated

from pydantic import Field

from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, Tokenizer
from tasks.common.haystack import SPEECHES, hide, speeches_version

PLACES = (
    "Alder Creek", "Bishop's Gate", "Copper Hill", "Dunmore", "Eastwater", "Fallow Bridge", "Granite Pass", "Holloway",
    "Iron Quay", "Juniper Bay", "Kestrel Point", "Larkfield", "Mill Harbor", "Northcote", "Orchard End", "Pine Ferry",
    "Quarry Lane", "Red Bluff", "Saltmarsh", "Thornbury",
)  # fmt: skip


class Needle(Task):
    """One number per prompt, at a controlled depth and an exact length."""

    name = "needle"
    summary = "a number hidden in presidential speeches, at controlled depth and length; exact match"
    metric = "exact_match"
    data = DataNote(licence=SPEECHES)

    class Options(OptionSet):
        """Lengths in tokens of the model at hand, depths from 0 to 1."""

        lengths: tuple[Annotated[int, Field(ge=192)], ...] = Field((1024,), description="prompt lengths in tokens")
        depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
            (0.1, 0.3, 0.5, 0.7, 0.9), description="where the needle lies, as a share of the speech"
        )
        repeats: Annotated[int, Field(ge=1)] = Field(4, description="samples for each length and depth")
        new_tokens: Annotated[int, Field(ge=1)] = Field(8, description="tokens to generate at most")

    options: Options

    def longest_prompt(self) -> int:
        """The longest of the lengths asked for."""
        return max(self.options.lengths)

    def fingerprint(self) -> str:
        """Of the speeches; raises where their package is missing."""
        return speeches_version()

    def count(self) -> int:
        """The repeats of each length and depth."""
        return self.options.repeats * len(self.options.lengths) * len(self.options.depths)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """All depths and lengths once, then again with other speeches, places and numbers."""
        grid = product(range(self.options.repeats), self.options.lengths, self.options.depths)
        for repeat, length, depth in islice(grid, self.context.limit):
            yield self._sample(tokenizer, repeat, length, depth)

    def _sample(self, tokenizer: Tokenizer, repeat: int, length: int, depth: float) -> Sample:
        name = f"{length}-{depth:g}-{repeat}"
        rng = random.Random(f"{self.context.seed} {name}")
        place, number = rng.choice(PLACES), str(rng.randrange(10000, 100000))
        needle = f"The secret number of {place} is {number}."
        ending = f"\n\nThe secret number of {place} that is mentioned in the text above is"
        hidden = hide(tokenizer, length, {needle: depth}, ending, rng.randrange(2**32))
        extra = {"length": length, "depth": depth, "needles": [list(span) for span in hidden.spans]}
        return Sample(name, hidden.text, (number,), self.options.new_tokens, question=ending, extra=extra)

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if the first number of the answer is the hidden one."""
        found = re.search(r"\d+", prediction)
        return float(found is not None and found.group() in sample.answers)
