"""Options that name a file with a setting for each layer and query head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.engine.shape import ModelShape
from harness.errors import InputError


def read_json(path: str, kind: Any) -> Any:
    """The value of a JSON file, as that type.

    Raises:
        ValueError: the file is missing or holds something else; one line.
    """
    try:
        return TypeAdapter(kind).validate_json(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" for part in first["loc"]) or "the file"
        raise ValueError(f"{place}: {first['msg']}") from None


def check_layers(owner: str, table: Sequence[Collection[Any]], shape: ModelShape) -> None:
    """Raises `InputError` unless the table of a method has all of the model's layers, and no heads that it lacks."""
    most = max(map(len, table), default=0)
    if len(table) != shape.layers or most > shape.heads:
        raise InputError(
            f"{owner}: the file has {len(table)} layers of up to {most} heads, "
            f"the model {shape.layers} of {shape.heads}"
        )
