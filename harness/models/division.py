"""A rank's part of a model's weights: which rows or columns of each tensor, and the model that they fill.

Transformers makes the rank's model of the same configuration with fewer heads and fewer channels of the feed forward;
`harness.engine.parallel` says what is summed.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from harness.engine.parallel import Ranks

_BY_OUTPUT = re.compile(r"\.(q|k|v|gate|up)_proj\.(weight|bias)$")
_BY_INPUT = re.compile(r"\.(o|down)_proj\.weight$")
_ONCE = re.compile(r"\.(o|down)_proj\.bias$")


def part_of(name: str, tensor: Tensor, ranks: Ranks) -> Tensor:
    """What a rank has of a parameter: rows or columns, in memory of their own, or all of it.

    A bias behind a sum over ranks counts on the first one alone.

    Args:
        name: by which transformers calls it.
        tensor: the whole of it, of which no more is read than the part.
        ranks: whose.
    """
    if ranks.size == 1:
        return tensor
    if _BY_OUTPUT.search(name) or _BY_INPUT.search(name):
        part = ranks.own(tensor, int(_BY_INPUT.search(name) is not None))
        return part.clone(memory_format=torch.contiguous_format)
    return torch.zeros_like(tensor) if ranks.rank and _ONCE.search(name) else tensor


def part_config(config: Any, ranks: Ranks) -> Any:
    """The transformers configuration of a rank's model; `config` itself where there is but one rank."""
    if ranks.size == 1:
        return config
    own = copy.deepcopy(config)
    own.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own.num_attention_heads = config.num_attention_heads // ranks.size
    own.num_key_value_heads = config.num_key_value_heads // ranks.size
    own.intermediate_size = config.intermediate_size // ranks.size
    return own


@torch.no_grad()
def cut_head(model: Any, ranks: Ranks) -> Any:
    """Leaves the model this rank's rows of logits; all of them where they do not share out."""
    weight = model.lm_head.weight
    if ranks.size > 1 and len(weight) % ranks.size == 0:
        tied, rows = weight is model.model.embed_tokens.weight, ranks.own(weight)
        model.lm_head.weight = nn.Parameter(rows if tied else rows.clone(), requires_grad=False)
    return model
