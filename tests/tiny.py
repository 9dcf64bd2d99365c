"""Tiny random models of every supported family, for tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from harness.engine import Engine, Request
from harness.shape import ModelShape
from methods.base import Method
from methods.registry import parse_methods

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
HEADS = {"GQA": (4, 2), "MHA": (4, 4), "MQA": (4, 1)}
VOCAB, LAYERS, HIDDEN, HEAD_DIM = 300, 6, 64, 16
END = VOCAB - 1


@cache
def tiny_model(family: str = "llama", heads: str = "GQA", layers: int = LAYERS) -> Any:
    """A random `*ForCausalLM` in fp32 whose attention is far from uniform."""
    config_class, model_class = FAMILIES[family]
    query_heads, kv_heads = HEADS[heads]
    config = config_class(
        hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=query_heads,
        num_key_value_heads=kv_heads, vocab_size=VOCAB, head_dim=HEAD_DIM, max_position_embeddings=4096,
        eos_token_id=END, pad_token_id=END, attn_implementation="sdpa",
        **({"sliding_window": None} if family == "mistral" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def tiny_shape(heads: str = "GQA", layers: int = LAYERS, family: str = "llama") -> ModelShape:
    """The shape of the tiny model."""
    query_heads, kv_heads = HEADS[heads]
    return ModelShape(family, layers, HIDDEN, 128, query_heads, kv_heads, HEAD_DIM, VOCAB, 4096)


@cache
def tiny_engine(family: str = "llama", heads: str = "GQA", layers: int = LAYERS) -> Engine:
    """An engine on the tiny model."""
    return Engine(tiny_model(family, heads, layers), tiny_shape(heads, layers, family))


def build(text: str, engine: Engine) -> Method:
    """The method that `--methods text` names, bound to the engine's model."""
    (spec,) = parse_methods(text)
    return spec.build(engine.context)


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    """[length] random token ids, the end token not among them."""
    return torch.randint(0, END, (length,), generator=torch.Generator().manual_seed(seed))


def generate(text: str, engine: Engine, ids: torch.Tensor, new_tokens: int = 8) -> list[int]:
    """New tokens under the method that `text` names."""
    return list(engine.stream(build(text, engine), Request(ids, new_tokens, frozenset([END]))))
