"""Variable tracking: a chain of assignments in noise, behind one worked example.

Wordings and settings are RULER's (NVIDIA/RULER, `synthetic/variable_tracking.py`), its slip of the pen included.
"""

from __future__ import annotations

import random
import string
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from tasks.ruler.draft import Ask, Counted, Draft, Maker, fill
from tasks.ruler.needles import NOISE

OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {value}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500


class Chain(NamedTuple):
    """Variables that all have one value.

    Attributes:
        text: their assignments in noise.
        names: of the variables.
        value: theirs.
        steps: the assignments.
    """

    text: str
    names: tuple[str, ...]
    value: str
    steps: tuple[str, ...]


class Tracking(Maker):
    """Asks for the variables of the one chain; its size counts sentences of noise."""

    new_tokens = 30

    def draft(self, ask: Ask, size: int, rng: random.Random) -> Draft:
        """The example with three-letter names and its answer, then the text."""
        shown, asked = chain(_noise(cast("Hashable", ask.tokenizer)), 3, rng), chain(size, 5, rng)
        example = OPENING + shown.text + _question(shown) + _prefix(shown) + " " + " ".join(shown.names)
        text = f"{example}\n\n\n\n{OPENING}{asked.text}{_question(asked)}"
        needles = tuple(step.strip() for step in asked.steps)
        return Draft(text, _question(asked), _prefix(asked), asked.names, needles)

    def sizes(self, folder: Path | None) -> range:
        """More sentences than assignments."""
        return range(HOPS + 2, super().sizes(folder).stop)


def chain(size: int, letters: int, rng: random.Random) -> Chain:
    """One value handed on from variable to variable, each assignment somewhere behind the one before.

    Args:
        size: sentences of noise.
        letters: of a variable's name.
        rng: draws names, value and places.
    """
    names = _names(HOPS + 1, letters, rng)
    value = str(rng.randrange(10000, 99999))
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]
    lines = [f"{NOISE}\n"] * size
    for shift, (place, step) in enumerate(zip(sorted(rng.sample(range(size), len(steps))), steps, strict=True)):
        lines.insert(place + shift, step)
    return Chain(" ".join(lines), tuple(names), value, tuple(steps))


def _names(count: int, letters: int, rng: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(drawn)


def _question(chain: Chain) -> str:
    return QUESTION.format(value=chain.value)


def _prefix(chain: Chain) -> str:
    return PREFIX.format(count=len(chain.names), value=chain.value)


@lru_cache(maxsize=4)
def _noise(tokenizer: Any) -> int:
    """Sentences of noise with which the example and its answer have 500 tokens."""

    def make(size: int) -> Counted:
        one = chain(size, 3, random.Random(0))
        tokens = len(tokenizer.encode(OPENING + one.text + _question(one) + _prefix(one)))
        return Counted(Draft("", "", "", ()), size, tokens, [])

    made = fill(make, EXAMPLE_TOKENS - Tracking.new_tokens, 0, range(HOPS + 2, 100), 10)
    return made.size if made else HOPS + 2
