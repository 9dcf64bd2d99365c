"""Chat templates that end: one that a checkpoint brings is rendered once, under a count, when the model is loaded.

A template is a program. Transformers runs it in jinja's sandbox, which keeps it from files and from Python's inside,
not from looping for ever. What this cannot bound: a template that runs away only on other conversations than the one
tried, and the time of a single operation inside jinja's own filters.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from harness.errors import InputError
from harness.models.weightless import last_line

# Lines of compiled template that one render may take; published templates take some hundred.
MAX_LINES = 200_000
MAX_TEXT = 2**20
# In a format: "%1000000d", "{:>1000000}".
_WIDTH = re.compile(r"[%{][^%{}]*\d{7}")
_CONVERSATION = [{"role": "user", "content": "What is the capital of France?"}]


class _RunsAway(Exception):
    """The template takes more than it may."""


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, without products and powers that alone fill the memory."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() + right.bit_length())
        elif operator == "*":
            _check_size(_length(left) * _length(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * abs(right))
        elif operator == "%":
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as jinja names them
        _check_arguments(getattr(__obj, "__self__", None), *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        _check_widths(getattr(value, "__self__", None))
        return super().wrap_str_format(value)


def check_template(owner: str, template: Any, tokenizer: Any) -> None:
    """Renders a chat template on one short message and refuses one that runs away, or that is none.

    A template that refuses this conversation by itself passes: it may want another one.

    Args:
        owner: whose it is, for the error ("model 'x'").
        template: jinja source, or several of them by name; None for none.
        tokenizer: its special tokens are what the template may name.

    Raises:
        InputError: says what is wrong.
    """
    for source in template.values() if isinstance(template, dict) else [template]:
        if source is not None:
            _check(owner, source, dict(getattr(tokenizer, "special_tokens_map", {})))


def _check(owner: str, source: Any, names: dict[str, Any]) -> None:
    try:
        _render(_compile(source), names)
    except (_RunsAway, RecursionError, MemoryError, OverflowError) as error:
        reason = last_line(error)
        raise InputError(f"{owner}: its chat template runs away on a short message: {reason}") from None
    except (TemplateSyntaxError, TypeError, SyntaxError) as error:
        raise InputError(f"{owner}: its chat template is broken: {last_line(error)}") from None
    except Exception:
        return  # a conversation that it does not take, said again where one is rendered


def _compile(source: Any) -> Template:
    if not isinstance(source, str) or len(source) > MAX_TEXT:
        raise TypeError("it is no text of reasonable length")
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # What transformers offers to templates, in a stricter sandbox.
    offered = _compile_jinja_template("").environment
    extensions = [type(extension) for extension in offered.extensions.values()]
    sandbox = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters.update({name: _modest(function) for name, function in offered.filters.items()})
    sandbox.globals.update(offered.globals)
    sandbox.globals.pop("lipsum", None)
    return sandbox.from_string(source)


def _render(template: Template, names: dict[str, Any]) -> None:
    length = 0
    with _counted_lines(MAX_LINES):
        for piece in template.generate(names, messages=_CONVERSATION, add_generation_prompt=True):
            _check_size(length := length + len(piece))


@contextmanager
def _counted_lines(most: int) -> Iterator[None]:
    """Ends the template's code after so many lines: loops that print nothing have no other hook."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        if count > most:
            raise _RunsAway(f"more than {most} steps")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def _modest(function: Any) -> Any:
    """The filter, refusing widths and counts that alone fill the memory."""

    @wraps(function)  # jinja's marks on the function included
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(*args, *kwargs.values())
        return function(*args, **kwargs)

    return checked


def _check_arguments(*values: Any) -> None:
    for value in values:
        _check_size(value if isinstance(value, int) else 0)
        _check_widths(value)


def _check_widths(text: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise _RunsAway("a width of more than six digits")


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else value if isinstance(value, int) else 1


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise _RunsAway(f"more than {MAX_TEXT} characters")
