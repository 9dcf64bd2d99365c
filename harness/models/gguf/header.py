"""The header of a GGUF file: metadata, and where the tensors lie.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


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
    """Walks through the little-endian header."""

    def __init__(self, data: Any) -> None:
        self.data, self.place = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.place)
        self.place += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        end = self.place + length
        raw, self.place = bytes(self.data[self.place : end]), end
        if len(raw) < length:
            raise ValueError("the file ends in its header")
        return raw.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.number(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack_from(layout, self.data, self.place)
        self.place += struct.calcsize(layout)
        return list(values)

    def tensor(self) -> tuple[str, TensorInfo]:
        name = self.text()
        dims = self.array(10, self.number("I"))
        return name, TensorInfo(tuple(reversed(dims)), self.number("I"), self.number("Q"))


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata, and tensors by name, of a GGUF file; no weights are read.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError, struct.error: it is no GGUF file, or cut short.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Reader(data))


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if reader.number("4s") != b"GGUF" or reader.number("I") not in (2, 3):
        raise ValueError("no GGUF header of version 2 or 3")
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(key_count)}
    relative = [reader.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.place // alignment) * alignment
    return metadata, {name: replace(info, offset=start + info.offset) for name, info in relative}
