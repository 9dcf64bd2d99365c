"""Checkpoints as Hugging Face lays them out: a local folder, or a model of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from harness.errors import InputError
from harness.models.random import read_config
from harness.models.weightless import last_line, transformers
from harness.storage.user_cache import files_digest

# Seconds that the hub may take to answer before what is in the local cache is used.
HUB_TIMEOUT = 5.0
# Weights of the same models in other formats lie in subfolders or are called consolidated.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]


class Checkpoint:
    """A folder with config.json, tokenizer and safetensors weights."""

    latency_only = False

    def __init__(self, name: str, families: tuple[str, ...]) -> None:
        """Finds the configuration, on the hub if need be, and looks whether the model is of a kind that runs.

        Args:
            name: path of a folder, or a hub id ("organisation/model").
            families: `model_type`s that may be loaded.

        Raises:
            InputError: neither a folder nor a reachable model, or a model of another kind.
        """
        self.name = name
        local = Path(name).expanduser()
        self.hub_id = None if local.is_dir() else _hub_id(name)
        self.folder = local if self.hub_id is None else _download(self.hub_id, ["config.json"])
        self._check(families)

    def config(self) -> Any:
        """The transformers configuration."""
        try:
            return transformers().AutoConfig.from_pretrained(self.folder)
        except Exception as error:  # strict dataclasses raise errors of their own
            raise InputError(f"model {self.name!r}: config.json is refused: {last_line(error)}") from None

    def load(self, config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """Model and tokenizer; a model of the hub is downloaded first.

        Raises:
            InputError: the weights or the tokenizer are missing or broken.
        """
        if self.hub_id is not None:
            self.folder = _download(self.hub_id, _WANTED)
        if not self._weights():
            raise InputError(f"model {self.name!r} has no .safetensors weights")
        auto = transformers()
        try:
            tokenizer = auto.AutoTokenizer.from_pretrained(self.folder)
            model = auto.AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
            )
        except Exception as error:  # whatever a broken folder provokes in tokenizers and safetensors
            raise InputError(f"model {self.name!r} cannot be loaded: {last_line(error)}") from None
        return model.to(device).requires_grad_(False).eval(), tokenizer

    def weights_hash(self) -> str:
        """Sha256 (hex) over the weight files' names and contents."""
        return files_digest(self._weights())

    def _weights(self) -> list[Path]:
        return [path for path in self.folder.glob("*.safetensors") if not path.name.startswith("consolidated")]

    def _check(self, families: tuple[str, ...]) -> None:
        if not (path := self.folder / "config.json").is_file():
            raise InputError(f"model {self.name!r}: the folder has no config.json")
        fields = read_config(path)
        if (family := fields["model_type"]) not in families:
            raise InputError(f"model {self.name!r} is of family {family!r}; supported: {', '.join(families)}")
        if quantised := fields.get("quantization_config"):
            method = quantised.get("quant_method", "some method")
            raise InputError(f"model {self.name!r} is quantised ({method}); use the full weights or a .gguf file")


def _hub_id(name: str) -> str:
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise InputError(f"no model {name!r}: not a folder, not a .gguf file, and it cannot be a hub id")
    return name


def _download(hub_id: str, patterns: list[str]) -> Path:
    transformers()  # keeps the hub's own messages off the terminal
    from huggingface_hub import snapshot_download, utils
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    utils.disable_progress_bars()  # type: ignore[attr-defined]  # exported lazily
    try:
        folder = snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_UNWANTED, etag_timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise InputError(f"model {hub_id!r} is gated; accept its licence on the hub and run: hf auth login") from None
    except RepositoryNotFoundError:
        raise InputError(f"no model {hub_id!r}: no folder of that name, and the hub has no such model") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"no model {hub_id!r}: no folder of that name, and the hub is offline with nothing in its cache"
        ) from None
    except Exception as error:  # errors of the network, of several libraries
        raise InputError(f"model {hub_id!r}: downloading from the hub failed: {last_line(error)}") from None
    return Path(folder)
