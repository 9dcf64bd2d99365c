from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from harness.rotary import Rotary

THETA = {"rope_theta": 1e4}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_moved_is_as_if_it_had_been_rotated_there(variant: str) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=VARIANTS[variant] | THETA)
    rotary = Rotary(LlamaRotaryEmbedding(config))
    x = torch.randn(9, 4, 16, generator=torch.Generator().manual_seed(0))
    here, there = torch.arange(9) + 40, torch.arange(9).flip(0) * 5
    moved = rotary.move(rotary(x, here), there - here)
    torch.testing.assert_close(moved, rotary(x, there), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rotary(x, here), rotary(x, there), atol=0.1)
