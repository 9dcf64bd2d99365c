from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from harness.engine.rotary import Rotary
from tests.reference.interpreter import DEVICE, kernels

angles = kernels("rowwise").angles
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_angles_of_the_kernel_are_those_of_the_module(variant: str, dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, rope_parameters=VARIANTS[variant] | THETA)
    module = LlamaRotaryEmbedding(config).to(DEVICE)
    positions = torch.tensor([[0, -1, 2, 77, 4095, 131_071] * 4] * 2, device=DEVICE).T[:, 0]
    expected = module(torch.empty(0, dtype=dtype, device=DEVICE), positions.unsqueeze(0))
    for ours, theirs in zip(angles(positions, module.inv_freq, module.attention_scaling, dtype), expected, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-7)
