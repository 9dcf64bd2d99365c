"""The one exception that means "the user's input is wrong", and the exit code of what Ctrl-C ended."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

INTERRUPTED = 130
"""Exit code, as shells have it: 128 and the signal's number."""


class InputError(Exception):
    """Bad input, explained in one line; the command line prints it and exits with code 2."""


class MissingPackage(InputError):
    """A package that is not installed; its arguments are lines that say what needs it and how to install it."""

    def __str__(self) -> str:
        return "; ".join(self.args)


@contextmanager
def missing_together() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Looks at one thing after the other, each under what this gives, and says at the end which packages all lack.

    Raises:
        MissingPackage: some are missing; each line once.
    """
    lines: dict[str, None] = {}

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except MissingPackage as error:
            lines.update(dict.fromkeys(error.args))

    yield noted
    if lines:
        raise MissingPackage(*lines)


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
