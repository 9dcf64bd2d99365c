"""`random:NAME`: real shapes with random weights. Speed and memory do not depend on the weights; accuracy does."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.parallel import ALONE, Ranks
from harness.errors import InputError, unknown
from harness.models import smollm2
from harness.models.division import cut_head, part_config, part_of
from harness.models.limits import ConfigFields, check, read_json
from harness.models.weightless import config_for, empty_model, finish

SEED = 0
WEIGHT_STD = 0.02

_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The published config.json files, fields at their default left out.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": _LLAMA_31_ROPE,
    },
    "llama-3.1-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": _LLAMA_31_ROPE,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    # Llama-2-7B with the window that Together gave it.
    "llama-2-7b-32k": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
    "xgen-7b": {
        "model_type": "llama",
        "vocab_size": 51200,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def known_name(model: str) -> str | None:
    """The known shape that a model has by its name, which has all parts of it; None of others.

    "meta-llama/Llama-3.1-8B" is "llama-3.1-8b".
    """
    parts = set(re.split(r"[-/:]", model.lower()))
    return next((name for name in KNOWN if parts >= set(name.split("-"))), None)


class ByteTokenizer:
    """One token a byte of UTF-8, ids 0 to 255, where no real tokenizer is installed."""

    chat_template = None
    eos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; there are no special tokens to add."""
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids above 255 and broken sequences become U+FFFD."""
        return b"".join(bytes([i]) if i < 256 else b"\xff" for i in token_ids).decode(errors="replace")


class RandomModel:
    """A model whose weights are drawn, not read."""

    latency_only = True

    def __init__(self, shape: str, families: tuple[str, ...]) -> None:
        """Reads the shape.

        Args:
            shape: a name in `KNOWN`, or the path of a config.json.
            families: `model_type`s that may be loaded.

        Raises:
            InputError: neither, or not the configuration of such a model.
        """
        self.fields = _fields(shape)
        check_family(f"random model {shape!r}", self.fields, families)

    def config(self) -> Any:
        """The transformers configuration."""
        fields = dict(self.fields)
        check(ConfigFields, "random model", fields)
        return config_for(fields.pop("model_type"), fields)

    def tokenizer(self, config: Any) -> Any:
        """That of the embedded model where there is one, else bytes.

        Raises:
            InputError: the vocabulary cannot even hold bytes.
        """
        return _tokenizer(config.vocab_size)

    def load(self, config: Any, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Any:
        """The model.

        The weights are drawn on `device` and in `dtype` at once: 8 B parameters as float32 in host memory first would
        take minutes and 32 GB. The same seed gives other weights on another device or in another dtype. Every rank
        draws them all, one parameter after the other, and keeps its part.
        """
        whole, generator = empty_model(config, dtype), torch.Generator(device).manual_seed(SEED)
        drawn = ((name, _drawn(name, like, generator)) for name, like in whole.named_parameters())
        state = {name: part_of(name, parameter, ranks) for name, parameter in drawn}
        model = empty_model(part_config(config, ranks), dtype)
        model.load_state_dict(state, assign=True, strict=False)  # a tied matrix has no weights of its own
        return cut_head(finish(model, device), ranks)

    def weights_hash(self) -> str:
        """Hash of the recipe: fields, seed and spread."""
        recipe = json.dumps([self.fields, SEED, WEIGHT_STD], sort_keys=True)
        return hashlib.sha256(recipe.encode()).hexdigest()


def _drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    parameter = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    if name.endswith(".bias"):
        return parameter.zero_()
    return parameter.fill_(1.0) if like.dim() == 1 else parameter.normal_(std=WEIGHT_STD, generator=generator)


def _tokenizer(vocab: int) -> Any:
    path = smollm2.find()
    if path is not None and vocab >= smollm2.VOCAB:
        return smollm2.tokenizer(path)
    if vocab < 256:
        raise InputError(f"random model: a vocabulary of {vocab} cannot hold the 256 bytes that its tokenizer needs")
    return ByteTokenizer()


def _fields(shape: str) -> dict[str, Any]:
    if shape in KNOWN:
        return KNOWN[shape]
    path = Path(shape).expanduser()
    if not shape.endswith(".json"):
        raise unknown("random model (a name, or a path ending in .json)", shape, KNOWN)
    if not path.is_file():
        raise InputError(f"random model: no file {shape}")
    return read_config(path)


def check_family(owner: str, fields: dict[str, Any], families: tuple[str, ...]) -> None:
    """Refuses a configuration of another family.

    Raises:
        InputError: names those that run.
    """
    if (family := fields["model_type"]) not in families:
        raise InputError(f"{owner} is of family {family[:40]!r}; supported: {', '.join(families)}")


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config.json.

    Raises:
        InputError: not JSON, or without a `model_type`.
    """
    fields = read_json(path)
    if not isinstance(fields.get("model_type"), str):
        raise InputError(f"{path} has no model_type, so it is no model's configuration")
    return fields
