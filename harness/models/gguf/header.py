"""The header of a GGUF file: metadata, and where the tensors lie.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Far above every published model: a vocabulary and its merges make some 10^6.
_MOST_VALUES = 2**22
_LONGEST_TEXT = 2**24
# ggml's own limit.
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: as torch has it, rows first.
        kind: ggml's number of the quantisation.
        offset: bytes from the start of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class _Reader:
    """Walks through the little-endian header; counts are compared with what is left before they are believed."""

    def __init__(self, data: Any) -> None:
        self.data, self.place, self.values = data, 0, 0

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{self.count(count, struct.calcsize(f'<{code}'))}{code}"
        values, self.place = struct.unpack_from(layout, self.data, self.place), self.place + struct.calcsize(layout)
        return values

    def count(self, count: int, least_bytes: int) -> int:
        """The count of values of at least so many bytes each, if there may be so many."""
        self.values += count
        if self.values > _MOST_VALUES:
            raise ValueError(f"its header holds more than {_MOST_VALUES} values")
        self.need(count * least_bytes)
        return count

    def need(self, count: int) -> None:
        if count > len(self.data) - self.place:
            raise ValueError("the file ends in its header")

    def text(self) -> str:
        length = self.number("Q")
        self.need(length)
        if length > _LONGEST_TEXT:
            raise ValueError(f"its header holds a text of {length} bytes")
        start, self.place = self.place, self.place + length
        return bytes(self.data[start : self.place]).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.number(_code(kind))

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.text() for _ in range(self.count(count, 8))]
        # No key of a supported model holds arrays of arrays, and their depth would have no bound.
        return list(self.numbers(_code(kind), count))

    def tensor(self) -> tuple[str, TensorInfo]:
        name, rank = self.text(), self.number("I")
        if not 1 <= rank <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:40]!r} has {rank} dimensions")
        return name, TensorInfo(tuple(reversed(self.numbers("Q", rank))), self.number("I"), self.number("Q"))


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its header holds a value of type {kind}, which no supported model has")
    return _SCALARS[kind]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata, and tensors by name, of a GGUF file; no weights are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no GGUF file, cut short, or its numbers make no sense.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Reader(data))


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if reader.data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    reader.place = 4
    if (version := reader.number("I")) not in (2, 3):
        raise ValueError(f"it is of version {version}, not 2 or 3")
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    metadata = _distinct((reader.text(), reader.value(reader.number("I"))) for _ in range(reader.count(key_count, 13)))
    relative = _distinct(reader.tensor() for _ in range(reader.count(tensor_count, 32)))
    start = -(-reader.place // (alignment := _alignment(metadata))) * alignment
    if any(start + info.offset >= len(reader.data) for info in relative.values()):
        raise ValueError("a tensor lies behind the end of the file")
    return metadata, {name: replace(info, offset=start + info.offset) for name, info in relative.items()}


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two up to {2**16}, not {str(alignment)[:40]}")
    return alignment


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header names {name[:40]!r} twice")
        found[name] = value
    return found
