"""The one exception that means "the user's input is wrong"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Bad input, explained in one line; the command line prints it and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that nothing answers to, with the nearest known one.

    Args:
        kind: what was looked for, in words ("method", "option of slim").
        name: what the user wrote.
        known: every name that would have been accepted.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(choices) or 'none'}"
    return InputError(f"unknown {kind} {name!r}; {hint}")
