"""A decode step's matrix products: how long reading their weights takes, where few programs read.

One token's products read every weight once. The engine's own kernels (`harness.engine.kernels.gemv`) give each program
a few rows of a weight, along which it walks a tile at a time: it waits for one tile while it works on the one before.
So a program alone reads no faster than memory's latency lets it, and a product of few or long rows, too few programs to
have all of memory's rate, lasts as long as one program. That is what tells shapes apart: LLaMA-3.1-8B's down projection
has 512 programs of 229 KB, Qwen2.5-7B's 448 of 303 KB for 16 % more weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from harness.engine.shape import ModelShape

PROGRAM_BYTES_PER_S = 6.9e9
"""What one program reads a second: of a device's latency, which differs less from card to card than its rate does. The
value with which one constant a launch explains the steps of three shapes on an H200 (docs/predict.md)."""
_ELEMENT = 2
_LINES = {"rows": 8, "tile": 1024}
_QKV = {"rows": 16, "tile": 512}
"""Rows of a weight that a program owns, and columns that it reads at a time, in the recorded runs that the constant is
from; what the kernels do now is in their own table."""


@dataclass(frozen=True)
class Product:
    """One weight of [n, k] elements of 16 bits; `rows` and `tile` say what a program does of it."""

    n: int
    k: int
    rows: int
    tile: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.n * self.k * _ELEMENT

    def seconds(self, reads: float) -> float:
        """At `reads` bytes a second of the device; a tile that is not full takes as long as one that is."""
        tiles = -(-self.k // self.tile)
        return max(self.nbytes / reads, self.rows * tiles * self.tile * _ELEMENT / PROGRAM_BYTES_PER_S)


@dataclass(frozen=True)
class Kernels:
    """The launches of a decode step of one request: a layer's products and its attention, and the logits."""

    shape: ModelShape

    @cached_property
    def layer(self) -> tuple[Product, ...]:
        """Queries, keys and values; output; gate and up; down."""
        shape, inner = self.shape, self.shape.heads * self.shape.head_dim
        joined = inner + 2 * shape.kv_heads * shape.head_dim
        return (
            Product(joined, shape.hidden, **_QKV),
            Product(shape.hidden, inner, **_LINES),
            Product(2 * shape.intermediate, shape.hidden, **_LINES),
            Product(shape.hidden, shape.intermediate, **_LINES),
        )

    @property
    def launches(self) -> int:
        """Of one step."""
        return self.shape.layers * (len(self.layer) + 1) + 1

    @property
    def weight_bytes(self) -> int:
        """That a step reads."""
        return self.shape.layers * sum(each.nbytes for each in self.layer) + self._head.nbytes

    def seconds(self, reads: float) -> float:
        """Of all products, at `reads` bytes a second."""
        return self.shape.layers * sum(each.seconds(reads) for each in self.layer) + self._head.seconds(reads)

    @property
    def _head(self) -> Product:
        return Product(self.shape.vocab, self.shape.hidden, **_LINES)
