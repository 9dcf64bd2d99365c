"""What an option can be, in words, for types that a plug-in may have."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Literal

import pytest
from pydantic import Field

from harness.option_help import describe
from harness.options import Budget, OptionSet


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Options(OptionSet):
    budget: Budget = Field(0.5, description="how much")
    sizes: tuple[Budget, ...] = (8192, 0.5)
    only: Literal["one"] = "one"
    number: Literal[1, 2] = 1
    colour: Colour | None = None
    pair: tuple[int, float] = (1, 0.5)
    above: float = Field(gt=0)
    below: int = Field(5, lt=9)
    made: str = Field(default_factory=lambda: "here")


@pytest.mark.parametrize(
    ("name", "values", "default"),
    [
        ("budget", "tokens (8192) or a share (0.5)", "0.5"),
        ("sizes", "tokens (8192) or a share (0.5), joined by /", "8192/0.5"),
        ("only", "one", "one"),
        ("number", "1, 2", "1"),
        ("colour", "red, blue", "by itself"),
        ("pair", "integer / number", "1/0.5"),
        ("above", "number > 0", "required"),
        ("below", "integer < 9", "5"),
        ("made", "text", "here"),
    ],
)
def test_every_type_has_words(name: str, values: str, default: str) -> None:
    found = {option.name: option for option in describe(Options)}
    assert (found[name].values, found[name].default) == (values, default)
    assert found["budget"].meaning == "how much"


def test_what_json_does_not_know_is_listed_all_the_same() -> None:
    class Odd(OptionSet):
        call: Callable[[], int] | None = None
        w: int = 3

    assert [(option.name, option.values, option.default) for option in describe(Odd)] == [
        ("call", "", "by itself"), ("w", "integer", "3"),
    ]  # fmt: skip


def test_no_options_are_no_rows() -> None:
    assert describe(OptionSet) == []
