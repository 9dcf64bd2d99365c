"""XAttention (Xu et al., arXiv 2503.16428): sums along antidiagonals tell which blocks of attention matter.

Tokens are taken in groups of `stride`. The queries of a group, the last one first, against the keys of a group, the
first one first, give the sum of the antidiagonal of a tile of logits, which meets every column and every diagonal.
These sums over stride * sqrt(d), through a causal softmax over groups, are added up over blocks of 128 by 128. Each row
of blocks attends to its first block, its own, and the heaviest others until they have the share `tau` of its sum.

Interpretations:
- `tau` is one number for all heads, or with `heads=FILE` one for each layer and head, as the authors searched them;
- the prompt ends with zeros up to a whole group, and there are no groups of zeros alone;
- with `rule=upstream`, rows of the authors' first estimated chunk (all of a prompt up to 16,384 tokens, 2,048 of 128K)
  choose as their code does: there the first block is not forced, unless something is left out, and the running sum is
  one block late, which keeps about one block a row more;
- `tau=1` is dense; of equal blocks the first is chosen.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.nn.functional import pad

from harness.engine.shape import ModelShape
from harness.engine.sparse import Choice
from harness.engine.step import Heads
from harness.options import OptionSet
from methods.common.antidiagonals import block_mass
from methods.common.block_map import BLOCK
from methods.common.head_file import by_head, check_heads, read_json
from methods.common.sparse_prefill import SparsePrefill

Share = Annotated[float, Field(ge=0, le=1)]
Table = list[list[Share]]
HeadFile = Annotated[Table | None, BeforeValidator(lambda path: read_json(path, Table))]


class XAttention(SparsePrefill):
    """Attends to the blocks with the heaviest antidiagonals."""

    name = "xattention"
    summary = "XAttention: the prefill attends to the blocks whose antidiagonals are heaviest"
    parallel = True
    nothing = MappingProxyType({"tau": "1", "heads": "none"})

    class Options(OptionSet):
        """How coarse, and how much."""

        stride: Literal["4", "8", "16"] = Field("16", description="tokens a group; paper: 8 and 16")
        tau: Share = Field(0.9, description="share of a row's estimated attention that the chosen blocks have")
        heads: HeadFile = Field(None, description="JSON file, a list of tau by head for each layer")
        rule: Literal["paper", "upstream"] = Field("paper", description="how blocks are chosen, see the module")

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for a file of another model."""
        assert isinstance(options, cls.Options)
        if options.heads is not None:
            check_heads(cls.name, [range(len(layer)) for layer in options.heads], shape, every=True)

    def choose(self, layer: int, heads: Heads) -> Choice | None:
        """Blocks of 128 by 128; None where every head has everything."""
        taus = self.model.ranks.own_heads(self.options.heads[layer]) if self.options.heads else [self.options.tau]
        if min(taus) == 1:
            return None
        mass = block_mass(heads.q, heads.k, int(self.options.stride))
        wanted = by_head(taus, mass.device).view(-1, 1, 1) * mass.sum(2, keepdim=True)
        chosen = fewest(mass, wanted)
        if self.options.rule == "upstream":
            rows = -(-first_chunk(len(heads)) // BLOCK)
            chosen[:, :rows] = lagging(mass[:, :rows], wanted[:, :rows])
        return Choice.on_grid(chosen, BLOCK)


def first_chunk(n: int) -> int:
    """Tokens of a prompt of n that the authors' code estimates first."""
    power = 1 << (n - 1).bit_length()
    return max(2048, min(power, (1 << 28) // power))


def fewest(mass: Tensor, wanted: Tensor) -> Tensor:
    """The first block, a row's own, and the heaviest others until they have what is wanted.

    Args:
        mass: [heads, rows, blocks], rows from the first on. wanted: [heads, rows, 1].

    Returns:
        [heads, rows, blocks] bool.
    """
    forced = torch.eye(*mass.shape[1:], dtype=torch.bool, device=mass.device)
    forced[:, 0] = True
    return _until(mass, forced, wanted, late=0) | forced


def lagging(mass: Tensor, wanted: Tensor) -> Tensor:
    """As the authors' code chooses in its first chunk, see the module; arguments as in `fewest`."""
    own = torch.eye(*mass.shape[1:], dtype=torch.bool, device=mass.device)
    chosen = _until(mass, own, wanted, late=1) | own
    left_out = (~chosen & torch.ones_like(own).tril()).any(2)
    chosen[:, :, 0] |= left_out
    return chosen


def _until(mass: Tensor, forced: Tensor, wanted: Tensor, late: int) -> Tensor:
    """The heaviest blocks beside forced ones, while those that came `late` or more before are not enough."""
    free = torch.ones_like(forced).tril() & ~forced
    values, order = torch.sort(mass.masked_fill(~free, -1.0), stable=True, dim=2, descending=True)
    before = pad(values.clamp(min=0).cumsum(2), (1 + late, 0))[:, :, : values.shape[2]]
    stays = (mass * forced).sum(2, keepdim=True) + before < wanted
    stays[:, :, :late] = True
    return torch.zeros_like(stays).scatter(2, order, stays & (values >= 0))
