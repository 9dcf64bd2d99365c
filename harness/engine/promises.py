"""What a method's hooks must return, looked at where the engine takes it: shapes and types, never values.

A wrong shape would otherwise fail in a matrix product further on, or be broadcast and fail nowhere. What would have to
be read from the device is left to `harness.conformance`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Rows


class BrokenPromise(Exception):
    """A hook returned what nothing can go on with.

    Attributes:
        hook: its name.
        layer: for which it was asked; None where it is not asked by layer.
    """

    def __init__(self, hook: str, message: str, layer: int | None = None) -> None:
        super().__init__(message)
        self.hook, self.layer = hook, layer


def prompt_ids(fed: Any, ids: Tensor) -> Tensor:
    """What `prompt` returned for `ids`, [n].

    Raises:
        BrokenPromise: not 1 to n token ids.
    """
    if not (_is_like(fed, ids) and fed.dim() == 1 and 1 <= len(fed) <= len(ids)):
        raise _broken("prompt", fed, f"{_name(ids)} [m], m from 1 to {len(ids)}")
    return fed  # type: ignore[no-any-return]


def late_tokens(value: Any, prompt_len: int) -> int:
    """What `question_tokens` returned.

    Raises:
        BrokenPromise: not 0 to `prompt_len` - 1.
    """
    if not (_is_count(value, int) and value < prompt_len):
        raise _broken("question_tokens", value, f"an int from 0 to {prompt_len - 1}")
    return int(value)


def caches(found: Any, layers: int) -> None:
    """Looks at a method's `cache` behind `begin`.

    Raises:
        BrokenPromise: not one for each layer.
    """
    if not isinstance(found, Sequence) or len(found) != layers:
        raise BrokenPromise("begin", f"left no `cache` for each of {layers} layers; super().begin makes them")


def attended(out: Any, layer: int, heads: Heads) -> Tensor:
    """What `attend` returned for `heads`.

    Raises:
        BrokenPromise: not a row for each query.
    """
    shape = [len(heads.q), heads.q.shape[1] * heads.q.shape[2]]
    if not _is_like(out, heads.q, shape):
        raise _broken("attend", out, f"{_name(heads.q)} {shape}, a row for each query", layer)
    return out  # type: ignore[no-any-return]


def rows(hook: str, out: Any, layer: int, before: Rows) -> Rows:
    """What `after_attention` or `after_layer` returned for the rows `before`.

    Raises:
        BrokenPromise: no rows, or parts of them that do not belong together.
    """
    if out is not before and not (isinstance(out, Rows) and _belong_together(out, before)):
        carried = "" if before.attended is None else " and attended"
        raise _broken(hook, out, f"Rows of 1 token or more, as many positions as hidden states{carried}", layer)
    return out


def replay(found: Any) -> Replay | None:
    """What `replay` returned.

    Raises:
        BrokenPromise: neither None nor a `Replay`.
    """
    if found is not None and not isinstance(found, Replay):
        raise _broken("replay", found, "a Replay, or None")
    return found


def by_layer(hook: str, values: Any, layers: int, kind: type = float) -> list[Any]:
    """What a hook counted in each layer.

    Raises:
        BrokenPromise: not one number for each layer, of 0 or more, and whole if `kind` is int.
    """
    if not isinstance(values, Sequence) or len(values) != layers or not all(_is_count(value, kind) for value in values):
        raise _broken(hook, values, f"{'an int' if kind is int else 'a number'} for each of {layers} layers")
    return list(values)


def count(hook: str, value: Any) -> int:
    """What a hook counted.

    Raises:
        BrokenPromise: no whole number of 0 or more.
    """
    if not _is_count(value, int):
        raise _broken(hook, value, "an int of 0 or more")
    return int(value)


def notes(value: Any) -> dict[str, Any]:
    """What `notes` returned.

    Raises:
        BrokenPromise: something that no record can hold.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        raise _broken("notes", value, "a dictionary of JSON values") from None
    if not isinstance(value, dict):
        raise _broken("notes", value, "a dictionary of JSON values")
    return value


def _is_count(value: Any, kind: type) -> bool:
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def _is_like(value: Any, model: Tensor, shape: Sequence[int] | None = None) -> bool:
    same = isinstance(value, Tensor) and value.dtype == model.dtype and value.device == model.device
    return same and (shape is None or list(value.shape) == list(shape))


def _belong_together(out: Rows, before: Rows) -> bool:
    if not _is_like(out.positions, before.positions) or out.positions.dim() != 1 or not len(out):
        return False
    parts = [(out.hidden, before.hidden)] + ([] if before.attended is None else [(out.attended, before.attended)])
    return all(_is_like(part, model, [len(out), model.shape[1]]) for part, model in parts)


def _broken(hook: str, returned: Any, expected: str, layer: int | None = None) -> BrokenPromise:
    return BrokenPromise(hook, f"returned {_described(returned)}; expected {expected}", layer)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_name(value)} {list(value.shape)} on {value.device}"
    if isinstance(value, Rows):
        return f"Rows of hidden {_described(value.hidden)}, positions {_described(value.positions)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
