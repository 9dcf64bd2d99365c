"""Recorded decode steps that are asked for one at a time, so that requests may come and go between any two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.replay import Replay


class SteppedDecode(RecordedDecode):
    """A `RecordedDecode` without cuts that begins no step ahead of being asked for it."""

    def begin(self, replay: Replay, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """The requests of the steps to come; records the step if it has not been yet.

        Args:
            replay: knows where their keys and values lie.
            tokens: the last one of each. positions: where it comes in.
        """
        self._prepare(replay, (), torch.tensor(tokens), positions)

    def step(self) -> list[int]:
        """The next token of each, once they are on the host."""
        self._pieces[0].replay(1)
        return self._fetch(0)()


class Laid(Replay):
    """`Replay` of requests whose caches were looked up when they came.

    Attributes:
        rows: as `DecodeTable.rows`, on the host.
    """

    rows: Tensor

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """From the rows, whatever the caches."""
        table.rows.copy_(self.rows, non_blocking=True)


class LaidRagged(RaggedReplay):
    """The same of KV heads that hold different numbers of tokens.

    Attributes:
        rows: [layers * batch, kv_heads, 3] int64, on the host.
    """

    rows: Tensor

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """From the rows, whatever the caches."""
        if not self._rows.numel():
            self._rows = torch.empty_like(self.rows, device=table.device)
        self._rows.copy_(self.rows, non_blocking=True)


LAID: dict[type[Replay], type[Laid] | type[LaidRagged]] = {Replay: Laid, RaggedReplay: LaidRagged}
"""What several requests' steps are done by together, by what each one's are done by."""


def laid(replay: Replay, caches: Sequence[LayerCache]) -> Tensor:
    """A request's part of the rows: [layers, 3], or [layers, kv_heads, 3] of heads of different lengths."""
    if isinstance(replay, RaggedReplay):
        return torch.tensor([[_row(head.keys, head.values) for head in cache.heads()] for cache in caches])
    return torch.tensor([_row(cache.keys, cache.values) for cache in caches])


def _row(keys: Tensor, values: Tensor) -> list[int]:
    return [keys.data_ptr(), values.data_ptr(), len(keys)]
