"""The one grammar of `--methods` and `--tasks`.

    methods = sum ("," sum)*                    slim+xattention:tau=0.95,full
    sum     = item ("+" item)*                  a method, and the sparse prefill of what it keeps
    items   = item ("," item)*                  slim:budgets=0.5/0.25,lazyllm
    item    = name ["/" member] (":" option)*   longbench/trec_e:fuzz=difflib
    option  = key "=" value                     budgets=0.5/0.25/0.125

A slash in a name goes into a group; a slash in a value separates the values of one option.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.errors import InputError


class Item(NamedTuple):
    """One method or task as the user asked for it."""

    name: str
    member: str | None
    options: dict[str, str]

    def __str__(self) -> str:
        """The item in the grammar again, options in the order they were given."""
        head = self.name if self.member is None else f"{self.name}/{self.member}"
        return ":".join([head, *(f"{key}={value}" for key, value in self.options.items())])


def without_paths(text: str) -> str:
    """Items in the grammar, absolute paths among the option values cut to their last name: safe to record."""
    return ",".join(str(item._replace(options=_names(item.options))) for item in parse_items(text))


def parse_sums(text: str) -> list[list[Item]]:
    """Splits a comma-separated list of sums.

    Raises:
        InputError: as `parse_items`.
    """
    sums = [[parse_item(part.strip()) for part in one.split("+")] for one in text.split(",")]
    _distinct(["+".join(map(str, one)) for one in sums])
    return sums


def sum_without_paths(items: list[Item]) -> str:
    """A sum in the grammar again, likewise."""
    return "+".join(str(item._replace(options=_names(item.options))) for item in items)


def _distinct(labels: list[str]) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label!r} is listed twice")


def _names(options: dict[str, str]) -> dict[str, str]:
    return {key: Path(value).name if value.startswith(("/", "~")) else value for key, value in options.items()}


def parse_items(text: str) -> list[Item]:
    """Splits a comma-separated list of items.

    Raises:
        InputError: an item is empty, repeated or malformed.
    """
    items = [parse_item(part.strip()) for part in text.split(",")]
    _distinct([str(item) for item in items])
    return items


def parse_item(text: str) -> Item:
    """Reads `name[/member][:key=value]...`.

    Raises:
        InputError: the name is empty, an option has no `=`, or a key repeats.
    """
    head, *pairs = text.split(":")
    name, slash, member = head.partition("/")
    if not name or (slash and not member):
        raise InputError(f"malformed item {text!r}; expected name[/member][:key=value]...")
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise InputError(f"malformed option {pair!r} in {text!r}; expected key=value")
        if key in options:
            raise InputError(f"option {key!r} is given twice in {text!r}")
        options[key] = value
    return Item(name, member or None, options)
