"""YAML read strictly and with the line of everything in it, so that every complaint can say where."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml

from harness.errors import InputError, unknown


def read_yaml(path: Path) -> Node:
    """The whole of a file.

    Raises:
        InputError: no such file, no YAML, or nothing in it; with the line where that is known.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise wrong(path, line, f"not YAML: {error.problem or 'unreadable'}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if node is None:
        raise InputError(f"{path} is empty")
    return Node(path, node)


def wrong(path: Path, line: int, message: str) -> InputError:
    """The error for something in a line of a file."""
    return InputError(f"{path} line {line}: {message}")


@dataclass(frozen=True)
class Entry:
    """A text of a file and the line it stands in."""

    text: str
    line: int


@dataclass(frozen=True)
class Node:
    """A part of a file."""

    path: Path
    node: yaml.Node

    @property
    def line(self) -> int:
        """Counted from 1."""
        return int(self.node.start_mark.line) + 1

    @property
    def is_mapping(self) -> bool:
        """Whether it is `key: value` lines."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_sequence(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.node, yaml.SequenceNode)

    def mapping(self, what: str, known: Collection[str] | None) -> dict[str, Node]:
        """Key -> value; each key once, and one of the known."""
        if not isinstance(self.node, yaml.MappingNode):
            raise wrong(self.path, self.line, f"{what} must be 'key: value' lines")
        found: dict[str, Node] = {}
        for key_node, value in self.node.value:
            key = Node(self.path, key_node)
            name = key.text()
            if known is not None and name not in known:
                raise wrong(self.path, key.line, str(unknown("key", name, known)))
            if name in found:
                raise wrong(self.path, key.line, f"key {name!r} stands twice")
            found[name] = Node(self.path, value)
        return found

    def items(self, what: str) -> list[Node]:
        """The values of a list; a single one is a list of one."""
        if not isinstance(self.node, yaml.SequenceNode):
            return [self]
        if not self.node.value:
            raise wrong(self.path, self.line, f"{what!r} has no values")
        return [Node(self.path, item) for item in self.node.value]

    def entries(self, what: str) -> list[Entry]:
        """The same as texts, each once."""
        found = [Entry(item.text(), item.line) for item in self.items(what)]
        for number, entry in enumerate(found):
            if entry.text in {other.text for other in found[:number]}:
                raise wrong(self.path, entry.line, f"{what!r} has {entry.text!r} twice")
        return found

    def text(self) -> str:
        """A scalar as it is written; what `true` or `0.50` means is for the option to say."""
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value.strip():
            raise wrong(self.path, self.line, "expected a single value")
        return str(self.node.value).strip()

    def value(self) -> str:
        """A scalar, or the values of one option, `[0.5, 0.25]`, as `0.5/0.25`."""
        return "/".join(item.text() for item in self.items("value")) if self.is_sequence else self.text()
