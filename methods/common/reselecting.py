"""Decode over an active set of blocks, chosen anew when it no longer fits: the second half of SlimInfer.

Decode can only choose among blocks whose keys and values exist. The layer in whose attention a choice fell has them for
everything that entered it: it keeps as many blocks as went on, and parks the rest (`methods.common.active_blocks`).
After each step's attention the active set is compared with the best blocks for that step's token; if less than the
share `gamma` of those is active, they replace it from the next token on, and the transfer hides behind the rest of the
step. Relevance is the softmax over units of their mean keys, the one reading that needs no parked key.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import OptionSet
from methods.common.active_blocks import ActiveBlocks
from methods.common.host_store import Offload
from methods.replay.slim import SlimReplay


class Reselecting(Method):
    """Attends in decode, where the prefill has called `copy_out`, to the active blocks.

    Attributes:
        active: the layers with an active set; a request's choices outlive it, since recorded steps know their memory.
    """

    reorders = True  # a block that comes in takes the slot of one that leaves

    class Options(OptionSet):
        """What blocks are, and when and from where they come in."""

        block: Annotated[int, Field(ge=1)] = Field(64, description="tokens a block")
        unit: Annotated[int, Field(ge=1)] = Field(8, description="tokens a unit")
        gamma: Annotated[float, Field(ge=0, le=1)] = Field(0.9, description="least overlap that keeps the active set")
        offload: Offload = Field("async", description="where parked blocks wait, and whether swaps are waited for")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.active: dict[int, ActiveBlocks] = {}
        # Sums over ranks come in the same order on all of them, so on one stream.
        beside = self.options.offload != "sync" and model.ranks.size == 1
        self._replay = SlimReplay(self.active, self.options.gamma, beside=beside)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Lets go of what the last request has parked."""
        self._forget()
        super().begin(prompt_len, max_new_tokens)
        self._parked = False

    def end(self) -> None:
        """Lets go of what is parked, too."""
        self._forget()
        super().end()

    def _forget(self) -> None:
        # The objects stay, so that a decode step that was recorded in their memory stays valid.
        for active in self.active.values():
            active.forget()

    @property
    def ends(self) -> tuple[int, int]:
        """First and last blocks that are always active; the last one is."""
        return 0, 1

    def copy_out(self, layer: int, chosen: Tensor, index: Tensor) -> None:
        """Begins to copy a layer's keys and values out, in the prefill; see `ActiveBlocks.copy_out`."""
        options = self.options
        if layer not in self.active:
            self.active[layer] = ActiveBlocks(
                options.block, options.unit, options.offload, self.model.ranks, ends=self.ends
            )
        self.active[layer].copy_out(self.cache[layer], chosen, index)

    def keep_whole(self, layer: int) -> None:
        """A layer parks nothing, so that no memory is kept for it either."""
        self.active.pop(layer, None)

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Full attention; in decode, layers with an active set attend to that, and choose anew."""
        if step.phase == "prefill" or layer not in self.active:
            return super().attend(layer, heads, step)
        self._park()
        out, active = super().attend(layer, heads, step), self.active[layer]
        active.bring_in(active.rechoose(heads.q[-1:], self.options.gamma))
        return out

    def replay(self) -> Replay:
        """The same work for every token: what comes in, if there is a choice, is decided and fetched on the device."""
        self._park()
        return self._replay if self.active else self.dense_replay

    def _park(self) -> None:
        """Once a request, ahead of decode: the caches are left with their active blocks."""
        if not self._parked:
            for active in self.active.values():
                active.park()
        self._parked = True

    def kv_bytes(self) -> int:
        """Bytes of the caches, and with `offload=none` of the parked blocks beside them."""
        return super().kv_bytes() + (self._waiting_bytes() if self.options.offload == "none" else 0)

    def kv_bytes_host(self) -> int:
        """Bytes of the parked keys and values."""
        return self._waiting_bytes() if self.options.offload != "none" else 0

    def bus_bytes(self) -> int:
        """Bytes of the blocks that came in, if they were parked on the host."""
        return self._moved_bytes() if self.options.offload != "none" else 0

    def _moved_bytes(self) -> int:
        return sum(active.moved_bytes for active in self.active.values())

    def _waiting_bytes(self) -> int:
        return sum(active.waiting_bytes for active in self.active.values())

    def extra_bytes(self) -> int:
        """Bytes of the units' mean keys that decode rates, and of what else it chooses with."""
        return sum(active.extra_bytes for active in self.active.values())

    def notes(self) -> dict[str, Any]:
        """How many steps changed a layer's active set, how many blocks came in for it, and the bytes of all of them."""
        if not self.active:
            return {}
        return {
            "kv_swaps": {str(layer): int(active.swaps) for layer, active in self.active.items()},
            "kv_blocks_moved": {str(layer): int(active.moved) for layer, active in self.active.items()},
            "kv_bytes_moved": self.model.ranks.size * self._moved_bytes(),
        }
