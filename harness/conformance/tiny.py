"""Tiny random models of every supported family: what the conformance kit and the tests run methods on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from harness.engine.engine import Engine
from harness.engine.shape import ModelShape
from harness.models.load import FAMILIES
from harness.models.weightless import config_for, empty_model, finish

HEADS = {"GQA": (4, 2), "MHA": (4, 4), "MQA": (4, 1)}
"""Query heads and key/value heads of each layout."""
VOCAB, LAYERS, HIDDEN, INTERMEDIATE, HEAD_DIM, CONTEXT = 300, 6, 64, 128, 16, 4096
END = VOCAB - 1
"""The end-of-sequence token."""
MODELS = [(family, heads) for family in FAMILIES for heads in HEADS]


@cache
def tiny_model(family: str = "llama", heads: str = "GQA", layers: int = LAYERS) -> Any:
    """A random `*ForCausalLM` in fp32 on the CPU, always the same, whose attention is far from uniform.

    Args:
        family: one of `FAMILIES`. heads: one of `HEADS`. layers: how deep.
    """
    model = empty_model(_config(family, heads, layers), torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean, std = (0.0, 0.2) if parameter.dim() > 1 else (1.0, 0.1)
        torch.nn.init.normal_(parameter, mean, std, generator)
    return finish(model, torch.device("cpu"))


def _config(family: str, heads: str, layers: int) -> Any:
    query_heads, kv_heads = HEADS[heads]
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": END,
        "pad_token_id": END,
        "tie_word_embeddings": False,
    }
    return config_for(family, fields | ({"sliding_window": None} if family == "mistral" else {}))


def tiny_shape(heads: str = "GQA", layers: int = LAYERS, family: str = "llama") -> ModelShape:
    """The shape of the tiny model."""
    query_heads, kv_heads = HEADS[heads]
    return ModelShape(family, layers, HIDDEN, INTERMEDIATE, query_heads, kv_heads, HEAD_DIM, VOCAB, CONTEXT)


@cache
def tiny_engine(family: str = "llama", heads: str = "GQA", layers: int = LAYERS) -> Engine:
    """An engine on the tiny model."""
    return Engine(tiny_model(family, heads, layers), tiny_shape(heads, layers, family))


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    """[length] int64 random token ids, the end token not among them."""
    return torch.randint(0, END, (length,), generator=torch.Generator().manual_seed(seed))
