"""Typed options of methods and tasks, read from `key=value` strings."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WithJsonSchema, model_validator

from harness.errors import InputError, unknown

_MOST = 2**31 - 1
"""Largest number that a counting option takes."""


class OptionSet(BaseModel):
    """Base of every method's and task's `Options`: frozen, strict about names, `a/b/c` for tuples.

    Field descriptions are shown by `harness methods NAME` and `harness tasks NAME`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _split_tuples(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: cls._split(key, value) for key, value in values.items()}

    @model_validator(mode="after")
    def _fits_tensors(self) -> Self:
        """No count that a tensor could not have: it would fail deep inside the first request."""
        for key, value in self:
            if isinstance(value, int) and abs(value) > _MOST:
                raise ValueError(f"{key}={value} is out of range; at most {_MOST}")
        return self

    @classmethod
    def _split(cls, key: str, value: Any) -> Any:
        field = cls.model_fields.get(key)
        is_tuple = field is not None and "tuple" in str(field.annotation)
        return tuple(value.split("/")) if is_tuple and isinstance(value, str) else value

    @classmethod
    def read(cls, owner: str, given: dict[str, str]) -> Self:
        """Validates the options given to `owner` on the command line.

        Raises:
            InputError: an unknown key (with the nearest known one) or a value that does not fit.
        """
        for key in given:
            if key not in cls.model_fields:
                raise unknown(f"option of {owner}", key, cls.model_fields)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise InputError(f"{owner}: {_one_line(error)}") from None


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][:1]) or "options"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" + (f" (got {first['input']!r})" if first["loc"] else "")


def _read_budget(value: Any) -> int | float:
    """`8192` is tokens, `0.5` a fraction of the prompt, `1` the whole prompt."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("expected tokens (8192) or a fraction of the prompt (0.5)") from None
    if not math.isfinite(number) or number <= 0:
        raise ValueError("a budget must be positive: this one keeps nothing")
    if number <= 1:
        return number
    if number != int(number) or "." in str(value):
        raise ValueError("a fraction may not exceed 1.0; tokens are written as integers")
    return int(number)


Budget = Annotated[
    int | float,
    BeforeValidator(_read_budget),
    WithJsonSchema({"type": "string", "format": "tokens (8192) or a share (0.5)"}),
]
"""How many prompt tokens to keep: an `int` above 1 counts tokens, a `float` up to 1.0 is a share of the prompt."""


def budget_tokens(budget: int | float, prompt_len: int) -> int:
    """The budget in tokens of a prompt of `prompt_len` tokens: never more than the prompt, and never nothing.

    A share is rounded up, as LazyLLM's `ceil(k * n)` does; the guard keeps 0.07 * 100 at 7.
    """
    if isinstance(budget, int):
        return min(budget, prompt_len)
    return min(prompt_len, max(1, math.ceil(round(budget * prompt_len, 6))))


def window_tokens(budget: int | float, prompt_len: int, total: int) -> int:
    """The budget of something that goes on growing in decode: tokens as given, a share of the prompt, or all.

    Args:
        budget: as in `budget_tokens`; the whole prompt (`1`) means no bound.
        prompt_len: tokens of the prompt.
        total: tokens there can ever be.
    """
    if budget == 1.0:
        return total
    return budget if isinstance(budget, int) else budget_tokens(budget, prompt_len)
