"""One model over several devices: each rank holds a part of every layer's heads and of its feed forward.

Queries, keys, values, gate and up are cut by output (heads, channels), the output projection and down by input, so that
a layer needs two sums over the ranks (Megatron-LM: Shoeybi et al., arXiv 1909.08053). The residual stream is whole on
every rank: the first one adds it, the others add to nothing, and the sum is the same everywhere, bit for bit. The
embedding is whole too; of the matrix that makes logits each rank has some rows, where they share out.

All ranks run the same requests in the same order. What a method reads off its own heads is its rank's alone; what it
reduces over heads goes through `Ranks`, and all ranks then choose alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.engine.shape import ModelShape
from harness.errors import InputError

Value = TypeVar("Value")
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13
_FOREVER = timedelta(days=30)
"""Ranks wait for each other as long as it takes: whoever started them sees it when one ends."""
TOGETHER = 60.0
"""Seconds between ranks that fail at the same place, at most."""
_LOOK = 0.02
_LEAVE = 10.0
"""Seconds that are waited for a group to be left."""


class Ranks:
    """The ranks that a model is spread over, seen from one of them. This one is alone: nothing is summed or sent.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        capture: how CUDA graphs are to be recorded, as `torch.cuda.graph` takes it.
    """

    rank, size = 0, 1
    capture = "global"

    def sum_(self, x: Tensor) -> Tensor:
        """Adds up the ranks' tensors of that shape, in place; all of them get the sum."""
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks of what is a mean over a rank's heads: the mean over all heads. May write to `x`."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """The greatest, element by element. May write to `x`."""
        return x

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """All ranks' tensors, one behind the other along a dimension: that of heads, or of the vocabulary."""
        return x

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along a dimension, a view: what `gather` undoes."""
        return x.chunk(self.size, dim)[self.rank]

    def own_heads(self, heads: Sequence[Value]) -> list[Value]:
        """This rank's part of what is said of each head of the whole model."""
        count = len(heads) // self.size
        return list(heads[self.rank * count : (self.rank + 1) * count])

    def part(self, shape: ModelShape) -> ModelShape:
        """What of a model's shape a rank has: its heads, channels of the feed forward and rows of logits."""
        share = self.size
        return replace(
            shape,
            heads=shape.heads // share,
            kv_heads=shape.kv_heads // share,
            intermediate=shape.intermediate // share,
            vocab=shape.vocab if shape.vocab % share else shape.vocab // share,
        )

    # Between hosts' memories; nothing of it is to be recorded.

    def objects(self, value: Value) -> list[Value]:
        """Every rank's value."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def barrier(self) -> None:
        """Waits until all ranks are here."""

    def regroup(self, reason: str) -> None:
        """Something failed here: goes on if it did so on every rank, since all are at the same place then.

        Raises:
            InputError: it failed on this rank alone; the others wait for it elsewhere, so the run cannot go on.
        """

    def agree(self, tokens: list[int]) -> None:
        """Looks whether all ranks have the same tokens.

        Raises:
            InputError: they do not: a method chose differently on them.
        """
        if any(other != tokens for other in self.objects(tokens)):
            raise InputError(f"{self.size} ranks do not have the same tokens: something is chosen by one's own heads")

    def every_head(self, layers: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """What all ranks' heads hold.

        Args:
            layers: for each layer what this rank's KV heads hold, [tokens] int64 each; one entry where all hold the
                same.

        Returns:
            The same of all ranks' heads; one entry where all of them are of one.
        """
        return layers


ALONE = Ranks()


def meeting_place(size: int, port: int = 0) -> Any:
    """The `torch.distributed` store through which ranks of this machine find each other.

    Args:
        size: how many they are.
        port: of the first one's; 0 is the first one, and makes it.
    """
    package: Any = dist
    return package.TCPStore("127.0.0.1", port, size, is_master=port == 0, wait_for_workers=False)


class RankGroup(Ranks):
    """A rank among others, through torch.distributed: NCCL between GPUs, gloo between processes on a CPU."""

    capture = "thread_local"  # NCCL has a thread of its own that looks after older sums meanwhile

    def __init__(self, rank: int, size: int, store: Any, backend: str) -> None:
        """
        Joins the others; waits until all are there.

        Args:
            rank, size: see `Ranks`.
            store: the `meeting_place`.
            backend: as PyTorch names them: "gloo", "cpu:gloo,cuda:nccl".
        """
        self.rank, self.size, self._backend = rank, size, backend
        self._store, self._failures = store, 0
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_FOREVER)
        self._hosts: Any = dist.new_group(backend="gloo", timeout=_FOREVER)

    def close(self) -> None:
        """Leaves the group, whatever the others do; nothing can be summed any more.

        NCCL waits for all CUDA graphs with sums in them to be gone: as long as that takes, but not here.
        """
        leaving = Thread(target=self._leave, daemon=True)
        leaving.start()
        leaving.join(_LEAVE)

    def _leave(self) -> None:
        if "nccl" in self._backend:
            # Else it would wait for sums that others have left.
            dist.group.WORLD._get_backend(torch.device("cuda")).abort()  # type: ignore[union-attr]
        dist.destroy_process_group()

    def sum_(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        return self.sum_(x).div_(self.size)

    def max(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """See `Ranks`."""
        first = x.movedim(dim, 0).contiguous()
        whole = first.new_empty((self.size * len(first), *first.shape[1:]))
        _gather(whole, first)
        return whole.movedim(0, dim)

    def objects(self, value: Value) -> list[Value]:
        """See `Ranks`."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._hosts)
        return found

    def any(self, flag: bool) -> bool:
        """See `Ranks`."""
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._hosts)
        return bool(flags)

    def barrier(self) -> None:
        """See `Ranks`."""
        dist.barrier(group=self._hosts)

    def regroup(self, reason: str) -> None:
        """See `Ranks`."""
        self._failures += 1
        here, end = f"failed {self._failures}", time.monotonic() + TOGETHER
        self._store.add(here, 1)
        # Not a barrier: those wait as long as any sum does.
        while self._store.add(here, 0) < self.size:
            if time.monotonic() > end:
                raise InputError(f"{reason}; rank {self.rank} of {self.size} failed where others did not")
            time.sleep(_LOOK)

    def every_head(self, layers: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """See `Ranks`."""
        ranks = self.objects([[head.cpu() for head in heads] for heads in layers])
        return [_side_by_side(each) for each in zip(*ranks, strict=True)]

    def send(self, order: Any) -> Any:
        """What the first rank says, on all of them; the others' argument means nothing."""
        said = [order]
        dist.broadcast_object_list(said, src=0, group=self._hosts)
        return said[0]


def _side_by_side(ranks: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """What a layer's heads hold, rank by rank; one entry where all of them hold the same."""
    most, first = max(map(len, ranks)), ranks[0]
    if most == 1 and all(torch.equal(heads[0], first[0]) for heads in ranks):
        return first
    return list(_each_head(ranks, most))


def _each_head(ranks: Sequence[Sequence[Tensor]], count: int) -> Iterator[Tensor]:
    for heads in ranks:
        yield from heads if len(heads) == count else [heads[0]] * count
