from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.options import Budget, OptionSet, budget_tokens


class Some(OptionSet):
    budgets: tuple[Budget, ...] = (0.5,)
    w: int = 4
    scale: float = 1.0


def test_values_are_typed_and_split() -> None:
    options = Some.read("slim", {"budgets": "8192/0.25/1", "w": "32"})
    assert options.budgets == (8192, 0.25, 1.0)
    assert isinstance(options.budgets[0], int) and options.w == 32


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"budgts": "0.5"}, "did you mean 'budgets'"),
        ({"w": "many"}, "slim: w:"),
        ({"budgets": "0"}, "keeps nothing"),
        ({"budgets": "0.5/-3"}, "keeps nothing"),
        ({"budgets": "1.5"}, "may not exceed"),
        ({"budgets": "nan"}, "keeps nothing"),
        ({"budgets": "half"}, "expected tokens"),
        ({"w": "99999999999999999999"}, "w=99999999999999999999 is out of range"),
        ({"scale": "inf"}, "scale: Input should be a finite number"),
    ],
)
def test_bad_options_are_named_in_one_line(given_: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as error:
        Some.read("slim", given_)
    assert words in str(error.value) and "\n" not in str(error.value)


@given(st.floats(1e-12, 1.0), st.integers(1, 200_000))
def test_a_share_is_at_least_a_token_and_at_most_the_prompt(share: float, prompt: int) -> None:
    assert 1 <= budget_tokens(share, prompt) <= prompt


def test_a_share_is_rounded_up_but_not_by_float_noise() -> None:
    assert budget_tokens(0.07, 100) == 7
    assert budget_tokens(0.34, 10) == 4
    assert budget_tokens(8192, 100) == 100
