"""Which KV heads need all of the text: gates from a file, and a score that needs no training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, WithJsonSchema
from torch import Tensor

from harness.engine.shape import ModelShape
from harness.engine.step import Heads
from harness.errors import InputError
from methods.common.future import Move
from methods.common.scores import head_attention

_OWN = Path(__file__).resolve().parent.parent / "data"
"""Where files of gates lie that come with the methods: METHOD-MODEL.tsv."""
_POSITIONS = 500
"""Places that the score looks back over."""


@dataclass(frozen=True)
class Gates:
    """A gate for each KV head, 0 (recent tokens suffice) to 1 (needs all): a row a layer."""

    rows: tuple[tuple[float, ...], ...]


GateFile = Annotated[Gates, WithJsonSchema({"type": "string", "format": "FILE.tsv, or a model's name"})]
"""The value of an option that `gates_for` reads."""


def gates_for(method: str) -> BeforeValidator:
    """Reads an option that names a file of gates, or a model whose gates for the method come with the harness.

    Its value is what is in the file, so that this is what identifies a run.
    """
    return BeforeValidator(partial(_read_gates, method))


def check_gates(owner: str, gates: Gates | None, shape: ModelShape) -> None:
    """Raises `InputError` where a method's gates are of a model of another shape."""
    rows = gates.rows if gates else None
    if rows and (len(rows), len(rows[0])) != (shape.layers, shape.kv_heads):
        raise InputError(
            f"{owner}: heads has gates for {len(rows)} layers of {len(rows[0])} KV heads; "
            f"the model has {shape.layers} of {shape.kv_heads}"
        )


def _read_gates(method: str, value: Any) -> Any:
    """Reads `full_attention_heads.tsv`, as DuoAttention publishes it; gates beyond 0 and 1 are cut to that.

    What numpy and pandas take for a comment is one here, too.
    """
    if not isinstance(value, str):
        return value
    own = _OWN / f"{method}-{value}.tsv"
    try:
        path = own if own.is_file() else Path(value).expanduser()
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or 'not a text'}") from None
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#"))
    rows = tuple(_row(number, line) for number, line in numbered)
    if len({len(row) for row in rows}) != 1:
        raise ValueError("expected a row a layer, with as many numbers in each")
    return Gates(rows)


def _row(number: int, line: str) -> tuple[float, ...]:
    try:
        gates = [float(cell) for cell in line.split("\t")]
    except ValueError:
        gates = [math.nan]
    if not all(map(math.isfinite, gates)):
        raise ValueError(f"line {number}: expected numbers with tabs between them")
    return tuple(min(max(gate, 0.0), 1.0) for gate in gates)


def full_heads(gates: Tensor, sparsity: float) -> list[list[bool]]:
    """Heads whose gate is not below the quantile `sparsity` of all gates; of equal ones the first.

    Args:
        gates: [layers, kv_heads].
        sparsity: 0 takes all heads, 1 none.
    """
    count = gates.numel() - math.ceil(round((gates.numel() - 1) * sparsity, 6)) if sparsity < 1 else 0
    full = torch.zeros(gates.numel(), dtype=torch.bool)
    full[gates.flatten().sort(stable=True, descending=True).indices[:count].cpu()] = True
    chosen: list[list[bool]] = full.view_as(gates).tolist()
    return chosen


def reach(heads: Heads, move: Move) -> Tensor:
    """How early in a text a KV head looks, from a text's mean query and key: [kv_heads] float32, 0 to 1.

    Both are taken before rotation and stand at each of 500 positions. Of the attention that the last one pays, this is
    the mean of the cumulative sum, mean over the query heads of a KV head (kvpress's score for models without gates).

    Args:
        heads: of all the text's tokens.
        move: as `ModelContext.move`.
    """
    query, key = (move(x, -heads.positions).mean(0, keepdim=True) for x in (heads.q, heads.k))
    places = torch.arange(_POSITIONS, device=key.device)
    row = head_attention(move(query, places[-1:]), move(key.expand(_POSITIONS, -1, -1), places))
    return row.cumsum(1).mean(1).view(key.shape[1], -1).mean(1)
