"""SlimInfer (Long et al., arXiv 2508.06447): progressive pruning of prompt blocks between the middle layers.

At a pruning layer the prompt is cut into blocks of 64 tokens, a block into units of 8. The last queries rate the
units, a block counts as much as its best unit, and the best blocks that fit the budget go on; the first block
(attention sink) and the last one always do. Survivors keep order and positions. The choice falls after the attention of
the layer before, so its feed forward already runs on survivors only.

Interpretations, where the paper leaves a choice:
- `score`: the literal mean over heads of |q . k| lets a few loud heads decide and finds less than random blocks do, so
  relevance is normalised: by default each token's attention from the last `w` queries, summed over a unit, mean over
  heads. `token_peak` is this project's own: the same, but a unit counts as much as to the head that wants it most,
  since few heads retrieve and a mean drowns them;
- the last, partial block stays, inside the budget;
- blocks are rated by those of the prompt's last `w` queries that are left. All are at the first pruning point; behind
  it, where the last block is shorter than `w`, those of the block before it are gone if that block is, and then fewer
  queries rate, never other ones;
- budgets may be shares of the prompt, so that short prompts are pruned at all;
- `ff=all` runs the feed forward of the layer before on every row, as a reading of the paper's figure allows;
- decode can only choose among blocks whose keys and values exist. The layer ahead of a pruning layer, where the choice
  fell, has them for everything that entered it: with `reselect=C` it keeps an active set of as many blocks as went on
  and parks the rest in host memory. After each step's attention the active set is compared with the best blocks for
  that step's token; if less than the share `gamma` of those is active, they replace it from the next token on, and the
  transfer hides behind the rest of the step (`offload`, see `methods.common.active_blocks`). Layers behind a pruning
  point hold just what they attend to, so nothing is left to choose there, which is all that the stricter reading,
  `reselect=A`, says. In decode relevance is the softmax over units of their mean keys, the one reading that needs no
  parked key.
- generated tokens are never pruned.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.options import Budget, OptionSet
from methods.common.active_blocks import ActiveBlocks, block_rows
from methods.common.host_store import Offload
from methods.common.schedule import budgets_in_tokens, check_schedule, pruning_layers, requested_tokens
from methods.common.scores import block_maxima, head_attention, token_attention, unit_absdot, unit_attention, unit_sums
from methods.replay.slim import SlimReplay

Count = Annotated[int, Field(ge=1)]


class Slim(Method):
    """Prunes hidden states block by block during the prefill; later layers never see what was dropped."""

    name = "slim"
    summary = "SlimInfer: progressive pruning of prompt blocks, feed forward on survivors"
    reorders = True  # a block that decode brings in takes the slot of one that leaves
    takes_sparse = True
    nothing = MappingProxyType({"budgets": "1/1/1"})

    class Options(OptionSet):
        """SlimInfer's settings; the defaults are the ones that measured best on the embedded model."""

        budgets: tuple[Budget, ...] = Field(
            (0.75, 0.375, 0.25), description="prompt tokens kept from each pruning layer on; paper: 8192/4096/2048"
        )
        layers: tuple[int, ...] | None = Field(
            None, description="first layer to hold each pruned set; paper: 10/20/30 of 32"
        )
        score: Literal["token_softmax", "token_peak", "softmax", "absdot"] = Field(
            "token_softmax", description="relevance: token softmax (mean or best head), over units, or literal |q.k|"
        )
        w: Count = Field(32, description="last queries that rate the blocks; paper: 4")
        block: Count = Field(64, description="tokens a block")
        unit: Count = Field(8, description="tokens a unit")
        sink: Annotated[int, Field(ge=0)] = Field(1, description="first blocks that always stay")
        tail: Count = Field(1, description="last blocks that always stay")
        ff: Literal["survivors", "all"] = Field("survivors", description="rows of the feed forward at a pruning point")
        reselect: Literal["C", "A"] = Field("C", description="what decode chooses from, see the module")
        gamma: Annotated[float, Field(ge=0, le=1)] = Field(0.9, description="least overlap that keeps the active set")
        offload: Offload = Field("async", description="where parked blocks wait, and whether swaps are waited for")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.layers = pruning_layers(self.options.layers, model.shape.layers)
        self.active: dict[int, ActiveBlocks] = {}
        self._replay = SlimReplay(self.active, self.options.gamma, beside=self.options.offload != "sync")

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for layers the model lacks and token budgets that cannot hold sink and tail."""
        assert isinstance(options, cls.Options)
        check_schedule(cls.name, options.layers, options.budgets, shape)
        if options.block % options.unit:
            raise InputError(f"{cls.name}: block={options.block} is not a multiple of unit={options.unit}")
        least = (options.sink + options.tail) * options.block
        for budget in options.budgets:
            if isinstance(budget, int) and budget < least:
                raise InputError(f"{cls.name}: a budget of {budget} keeps nothing; sink and tail need {least}")

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns the budgets into tokens of this prompt; sink and tail always fit."""
        self._forget()
        super().begin(prompt_len, max_new_tokens)
        least = (self.options.sink + self.options.tail) * self.options.block
        self.budgets = [max(least, tokens) for tokens in budgets_in_tokens(self.options.budgets, prompt_len)]
        self.parked = False

    def end(self) -> None:
        """Lets go of what waits, too."""
        self._forget()
        super().end()

    def _forget(self) -> None:
        # The objects stay, so that a decode step that was recorded in their memory stays valid.
        for active in self.active.values():
            active.forget()

    def tokens_requested(self) -> list[int]:
        """The budgets, in tokens."""
        return requested_tokens(self.layers, self.budgets, self.prompt_len, self.model.shape.layers)

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Full attention; in decode, the layers where a choice fell attend to their active blocks."""
        if step.phase == "prefill" or layer not in self.active:
            return super().attend(layer, heads, step)
        self._park()
        out, active = super().attend(layer, heads, step), self.active[layer]
        active.bring_in(active.reselect(active.wanted(heads.q[-1:]), self.options.gamma))
        return out

    def replay(self) -> Replay:
        """The same work for every token: what comes in is decided, and fetched, on the device."""
        self._park()
        return self._replay

    def _park(self) -> None:
        if not self.parked:
            for active in self.active.values():
                active.park()
        self.parked = True

    def after_attention(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Drops rows before the feed forward of the layer ahead of a pruning layer."""
        return self._prune(layer, rows, heads, step) if self.options.ff == "survivors" else rows

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Drops rows after that feed forward instead, with `ff=all`."""
        return self._prune(layer, rows, heads, step) if self.options.ff == "all" else rows

    def _prune(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        if step.phase != "prefill" or layer + 1 not in self.layers:
            return rows
        budget = self.budgets[self.layers.index(layer + 1)]
        if budget >= len(rows):
            self.active.pop(layer, None)  # nothing is parked here, so no memory is kept for it either
            return rows
        with self.model.part("score"):
            scores = self.block_scores(heads)
        with self.model.part("select"):
            lift = self._lift(scores)
            chosen = self.choose(scores + lift, budget, len(rows))
            index = block_rows(chosen, self.options.block, len(rows))
        if self.options.reselect == "C":
            self._copy_out(layer, chosen, lift)
        with self.model.part("gather"):
            return rows.select(index)

    def _copy_out(self, layer: int, chosen: Tensor, lift: Tensor) -> None:
        options = self.options
        if layer not in self.active:
            self.active[layer] = ActiveBlocks(options.block, options.unit, options.offload)
        self.active[layer].copy_out(self.cache[layer], chosen, lift)

    def block_scores(self, heads: Heads) -> Tensor:
        """Relevance of each block of the rows that are left, [ceil(n / block)]."""
        unit, q = self.options.unit, heads.q[-self.options.w :]
        weights = self._raters(heads.positions[-self.options.w :])
        if self.options.score == "token_softmax":
            units = unit_sums(token_attention(q, heads.k, weights), unit)
        elif self.options.score == "token_peak":
            units = unit_sums(head_attention(q, heads.k, weights).T, unit).amax(1)
        else:
            mean = torch.einsum("w,whd->hd", weights, q.float()).to(q.dtype).unsqueeze(0)
            units = (unit_attention if self.options.score == "softmax" else unit_absdot)(mean, heads.k, unit)
        return block_maxima(units, self.options.block // unit)

    def _raters(self, positions: Tensor) -> Tensor:
        """How much the queries of the last rows count: equally if they are of the prompt's last `w`, else not at all.

        How many those are only the device knows, so the others stay, at weight 0: [w] int64 -> [w] float32.
        """
        last = (positions >= self.prompt_len - self.options.w).float()
        return last / last.sum()

    def _lift(self, scores: Tensor) -> Tensor:
        """What makes sink and tail the best blocks: infinity there, else 0, [blocks]."""
        lift = torch.zeros_like(scores)
        lift[: self.options.sink] = torch.inf
        lift[-self.options.tail :] = torch.inf
        return lift

    def choose(self, scores: Tensor, budget: int, rows: int) -> Tensor:
        """The best blocks that fit into `budget` of the `rows` tokens, [m] ascending; all but the last one are full."""
        missing = scores.shape[0] * self.options.block - rows
        return scores.topk((budget + missing) // self.options.block).indices.sort().values

    def kv_bytes(self) -> int:
        """Bytes of the caches, and with `offload=none` of the parked blocks beside them."""
        return super().kv_bytes() + (self._waiting_bytes() if self.options.offload == "none" else 0)

    def kv_bytes_host(self) -> int:
        """Bytes of the parked keys and values."""
        return self._waiting_bytes() if self.options.offload != "none" else 0

    def _waiting_bytes(self) -> int:
        return sum(active.waiting_bytes for active in self.active.values())

    def extra_bytes(self) -> int:
        """Bytes of the units' mean keys that decode rates, and of what else it chooses with."""
        return sum(active.extra_bytes for active in self.active.values())

    def notes(self) -> dict[str, Any]:
        """How many steps changed a layer's active set, and the bytes that came in for it."""
        if not self.active:
            return {}
        return {
            "kv_swaps": {str(layer): int(active.swaps) for layer, active in self.active.items()},
            "kv_bytes_moved": sum(active.moved_bytes for active in self.active.values()),
        }
