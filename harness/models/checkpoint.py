"""Checkpoints as Hugging Face lays them out: a local folder, or a model of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from harness.engine.parallel import ALONE, Ranks
from harness.errors import InputError
from harness.models.limits import ConfigFields, check, read_json
from harness.models.random import check_family, read_config
from harness.models.weightless import last_line, transformers
from harness.models.weights import fill_from_safetensors
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
        self.owner = f"model {name!r}"
        local = Path(name).expanduser()
        self.hub_id = None if local.is_dir() else _hub_id(name)
        self.folder = local if self.hub_id is None else _download(self.hub_id, ["config.json"])
        self._check(families)

    def config(self) -> Any:
        """The transformers configuration."""
        try:
            return transformers().AutoConfig.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # strict dataclasses raise errors of their own
            raise InputError(f"{self.owner}: config.json is refused: {last_line(error)}") from None

    def tokenizer(self, config: Any) -> Any:
        """The tokenizer; a model of the hub is downloaded first, weights and all.

        Raises:
            InputError: there is none, or it is broken.
        """
        self._fetch()
        self._refuse_code("tokenizer_config.json")
        try:
            return transformers().AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # whatever a broken folder provokes in tokenizers
            raise InputError(f"{self.owner}: its tokenizer cannot be loaded: {last_line(error)}") from None

    def load(self, config: Any, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Any:
        """The model; one of the hub is downloaded first.

        Raises:
            InputError: the weights are missing, broken, or do not fit the configuration.
        """
        self._fetch()
        files = weight_files(self.owner, self.folder)
        model = fill_from_safetensors(self.owner, config, files, device, dtype, ranks)
        model.generation_config = self._generation(model.generation_config)
        return model

    def weights_hash(self) -> str:
        """Sha256 (hex) over the names and contents of the files that `load` reads weights from."""
        return files_digest(weight_files(self.owner, self.folder))

    def _fetch(self) -> None:
        if self.hub_id is not None:
            self.folder, self.hub_id = _download(self.hub_id, _WANTED), None

    def _generation(self, default: Any) -> Any:
        if not (self.folder / "generation_config.json").is_file():
            return default
        try:
            return transformers().GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise InputError(f"{self.owner}: generation_config.json is refused: {last_line(error)}") from None

    def _check(self, families: tuple[str, ...]) -> None:
        if not (path := self.folder / "config.json").is_file():
            raise InputError(f"{self.owner}: the folder has no config.json")
        fields = read_config(path)
        check_family(self.owner, fields, families)
        if quantised := fields.get("quantization_config"):
            method = quantised.get("quant_method", "some method") if isinstance(quantised, dict) else quantised
            raise InputError(f"{self.owner} is quantised ({method}); use the full weights or a .gguf file")
        check(ConfigFields, f"{self.owner}: config.json", fields)
        self._refuse_code("config.json")

    def _refuse_code(self, file: str) -> None:
        path = self.folder / file
        if path.is_file() and read_json(path).get("auto_map"):
            raise InputError(f"{self.owner}: {file} names code of its own (auto_map), which is never run")


def weight_files(owner: str, folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, as transformers picks them: one, or those of an index.

    Raises:
        InputError: there are none, or the index names something that is no file of the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [_inside(owner, folder, single.name)]
    if not index.is_file():
        raise InputError(f"{owner} has no .safetensors weights")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{owner}: {index.name} has no weight_map")
    return [_inside(owner, folder, name) for name in sorted(set(map(str, names.values())))]


def _inside(owner: str, folder: Path, name: str) -> Path:
    """The file of that name, which lies in the folder; a snapshot of the hub's cache links to the blobs beside it."""
    path, home = folder / name, folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not re.fullmatch(r"[\w.-]+\.safetensors", name) or (path.exists() and path.resolve().parent not in homes):
        raise InputError(f"{owner}: the weights {name[:80]!r} are no file of its folder")
    if not path.is_file():
        raise InputError(f"{owner}: the weights {name[:80]!r} are missing")
    return path


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
