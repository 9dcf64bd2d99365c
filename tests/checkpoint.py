"""A checkpoint that loads and runs in no time: a tiny random model with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from harness.models.load import load

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 49152,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def save_checkpoint(folder: Path) -> str:
    """Writes the checkpoint into `folder`; returns what `--model` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shape.json").write_text(json.dumps(CONFIG))
    loaded = load(f"random:{folder / 'shape.json'}", "cpu", "float32")
    torch.manual_seed(0)
    for parameter in loaded.model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # attention far from uniform
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)
