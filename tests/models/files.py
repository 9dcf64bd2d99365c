"""Tiny models as files, for tests of loading: a folder of Hugging Face's layout, and ways to damage it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.models.weightless import config_for, empty_model, finish, transformers

FIELDS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def save_folder(folder: Path, family: str = "llama", vocabulary: int = 60, **fields: Any) -> Path:
    """Writes a random model and a tokenizer of `vocabulary` words into the folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    model = empty_model(config_for(family, {**FIELDS, **fields}), torch.float32).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    finish(model, torch.device("cpu")).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    transformers().PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, drop: str = "", **tensors: torch.Tensor) -> None:
    """Leaves tensors whose name contains `drop` out, and adds or replaces others (`__` stands for a dot)."""
    path = folder / "model.safetensors"
    kept = {name: tensor.clone() for name, tensor in load_file(path).items() if not drop or drop not in name}
    save_file(kept | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
