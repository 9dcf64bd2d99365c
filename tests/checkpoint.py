"""A checkpoint that loads and runs in no time: a tiny random model with a real tokenizer."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from harness.models.load import load

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 49152,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def save_checkpoint(folder: Path) -> str:
    """Writes the checkpoint into `folder`; returns what `--model` takes."""
    shutil.copytree(_made().name, folder, dirs_exist_ok=True)
    return str(folder)


@cache
def _made() -> TemporaryDirectory[str]:
    made = TemporaryDirectory()
    folder = Path(made.name)
    (folder / "shape.json").write_text(json.dumps(CONFIG))
    loaded = load(f"random:{folder / 'shape.json'}", "cpu", "float32")
    torch.manual_seed(0)
    for parameter in loaded.model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # attention far from uniform
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return made
