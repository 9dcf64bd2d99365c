"""Options that name a file with a setting for each layer and query head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from harness.engine.shape import ModelShape
from harness.errors import InputError


def read_json(given: Any, kind: Any) -> Any:
    """The value of a JSON file, as that type, or None for "none"; what is no path was read before.

    Raises:
        ValueError: the file is missing or holds something else; one line.
    """
    if given == "none":
        return None
    if not isinstance(given, str):
        return given
    try:
        return TypeAdapter(kind).validate_json(Path(given).expanduser().read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" for part in first["loc"]) or "the file"
        raise ValueError(f"{place}: {first['msg']}") from None


def by_head(values: Sequence[float], device: torch.device) -> Tensor:
    """Settings of the heads, [heads], on their way to the device while the host goes on."""
    return torch.tensor(values).to(device, non_blocking=True)


def check_heads(owner: str, named: Sequence[Collection[int]], shape: ModelShape, *, every: bool = False) -> None:
    """Raises `InputError` where a method's file does not fit the model.

    Args:
        owner: the method.
        named: for each layer of the file, the heads that it names.
        shape: of the model.
        every: the file has to name them all.
    """
    if len(named) != shape.layers:
        raise InputError(f"{owner}: the file has {len(named)} layers, the model {shape.layers}")
    there = set(range(shape.heads))
    for layer, heads in enumerate(named):
        if not set(heads) <= there or (every and set(heads) != there):
            raise InputError(f"{owner}: layer {layer} of the file does not have the model's {shape.heads} heads")
