"""From a model's name to the model: what runs, on which device, in which dtype.

A name is a hub id ("Qwen/Qwen2.5-1.5B"), a local folder, a `.gguf` file, `smollm2` (the embedded default), or
`random:SHAPE` (real shape, random weights: honest latencies, meaningless answers).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from harness.engine.parallel import ALONE, Ranks
from harness.engine.shape import ModelShape, sliding_window
from harness.errors import InputError, unknown
from harness.models.checkpoint import Checkpoint
from harness.models.gguf.file import GgufFile
from harness.models.limits import ConfigFields, check, check_rope
from harness.models.memory import check_memory
from harness.models.random import KNOWN, RandomModel
from harness.models.smollm2 import SmolLM2
from harness.models.template import check_template

_OWN_NAMES = ("smollm2", *(f"random:{shape}" for shape in KNOWN))
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: as the user wrote it.
        model: a transformers `*ForCausalLM` in eval mode, without gradients, attention implementation "sdpa".
        tokenizer: what tasks expect (`tasks.base.Tokenizer`).
        shape: the whole model's numbers.
        latency_only: the weights are random, so answers and scores mean nothing.
        eos_ids: tokens that end an answer; none where the weights are random, which would stop anywhere.
        weights_hash: sha256 (hex) of the weights' content, of the GGUF file, or of a random model's recipe.
    """

    name: str
    model: Any
    tokenizer: Any
    shape: ModelShape
    latency_only: bool
    eos_ids: frozenset[int]
    weights_hash: str


@dataclass(frozen=True)
class Outline:
    """A model as it is known without its weights.

    Attributes:
        shape: its numbers.
        tied: whether the output matrix is the embedding.
        tokenizer: see `LoadedModel`.
        eos_ids: none are known; what is read beside the weights says them.
    """

    shape: ModelShape
    tied: bool
    tokenizer: Any
    eos_ids: frozenset[int] = frozenset()


class Source(Protocol):
    """Where a model comes from; making one checks that it is there."""

    latency_only: bool

    def config(self) -> Any:
        """The transformers configuration; reads no weights."""

    def tokenizer(self, config: Any) -> Any:
        """The tokenizer; no device is touched."""

    def load(self, config: Any, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Any:
        """The model, or this rank's part of it, on the device and in the dtype."""

    def weights_hash(self) -> str:
        """Sha256 (hex) that changes with the weights; asked for after `load`."""


def describe(name: str) -> ModelShape:
    """Shape of the model, without loading its weights.

    Raises:
        InputError: no such model, or one that the harness cannot run.
    """
    return _shape(name, _source(name).config())


def outline(name: str) -> Outline:
    """What is known of the model that `load` loads, without its weights.

    Raises:
        InputError: as `load`.
    """
    config = (source := _source(name)).config()
    return Outline(_shape(name, config), bool(config.tie_word_embeddings), _tokenizer(name, source, config))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model that `load` loads, without the model.

    Raises:
        InputError: as `load`.
    """
    return _tokenizer(name, source := _source(name), source.config())


def load(name: str, device: str = "auto", dtype: str = "auto", ranks: Ranks = ALONE) -> LoadedModel:
    """Loads a model.

    Args:
        name: see the module.
        device: "auto", "cpu" or "cuda"; auto is CUDA where there is one.
        dtype: "auto", "float32", "bfloat16" or "float16"; auto is float32 on the CPU, bfloat16 on CUDA.
        ranks: of whose model this one's part is loaded.

    Raises:
        InputError: no such model, one that the harness cannot run, or a device that is not there.
    """
    place = resolve_device(device)
    number = resolve_dtype(dtype, place)
    source = _source(name)
    config = source.config()
    shape = _shape(name, config)
    check_memory(name, shape, bool(config.tie_word_embeddings), place, number, ranks)
    tokenizer = _tokenizer(name, source, config)
    model = source.load(config, place, number, ranks)
    ends = frozenset() if source.latency_only else _end_ids(model, tokenizer)
    return LoadedModel(name, model, tokenizer, shape, source.latency_only, ends, source.weights_hash())


def resolve_device(device: str) -> torch.device:
    """The device behind "auto", "cpu" or "cuda".

    Raises:
        InputError: another name, or CUDA where there is none.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise InputError("device cuda was asked for, but PyTorch finds no CUDA device here")
    return torch.device("cuda" if present and device != "cpu" else "cpu")


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Lets PyTorch allocate no more than this much of the device's memory; None takes a former limit back.

    Raises:
        InputError: the device is no CUDA device, or smaller than that.
    """
    if device.type != "cuda":
        if gib is not None:
            raise InputError("--memory-limit needs a CUDA device: PyTorch cannot limit a CPU's memory")
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if gib is not None and gib * 2**30 > total:
        raise InputError(f"--memory-limit {gib:g} is more than the device's {total / 2**30:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * 2**30 / total)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype behind a name; "auto" is float32 on the CPU and bfloat16 elsewhere.

    Raises:
        InputError: another name.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, ("auto", *DTYPES))
    return DTYPES[dtype]


def _source(name: str) -> Source:
    if name == "smollm2":
        return SmolLM2()
    if name.startswith("random:"):
        return RandomModel(name.removeprefix("random:"), FAMILIES)
    path = Path(name).expanduser()
    if name.endswith(".gguf") or path.is_file():
        if not path.is_file():
            raise InputError(f"no model {name!r}: there is no such file")
        return GgufFile(path)
    if not path.is_dir() and (near := difflib.get_close_matches(name, _OWN_NAMES, n=1, cutoff=0.7)):
        raise InputError(f"unknown model {name!r}; did you mean {near[0]!r}?")
    return Checkpoint(name, FAMILIES)


def _shape(name: str, config: Any) -> ModelShape:
    check(ConfigFields, f"model {name!r}", {"model_type": config.model_type, **vars(config)})
    check_rope(f"model {name!r}", config.rope_parameters or {})
    trained, window = _trained_context(config), sliding_window(config)
    if window is not None and window >= trained:
        window = None
    return ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        max_context=window or trained,
        window=window,
    )


def _trained_context(config: Any) -> int:
    """Most positions; Qwen's instructions for YaRN leave `max_position_embeddings` at the length before scaling."""
    longest, rope = int(config.max_position_embeddings), config.rope_parameters
    if rope["rope_type"] != "yarn":
        return longest
    return max(longest, int(rope["factor"] * (rope.get("original_max_position_embeddings") or 0)))


def _tokenizer(name: str, source: Source, config: Any) -> Any:
    """Refuses one that gives ids for which the embedding has no row, and a chat template that is of no use."""
    tokenizer, rows = source.tokenizer(config), config.vocab_size
    highest = max(tokenizer.get_vocab().values(), default=-1) if hasattr(tokenizer, "get_vocab") else 255
    if highest >= rows:
        raise InputError(f"model {name!r}: its tokenizer gives ids up to {highest}, its embedding has {rows} rows")
    check_template(f"model {name!r}", tokenizer.chat_template, tokenizer)
    return tokenizer


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    holders = (model.generation_config, model.config, tokenizer)
    given = [getattr(holder, "eos_token_id", None) for holder in holders]
    lists = [ids if isinstance(ids, list) else [ids] for ids in given]
    return frozenset(int(i) for ids in lists for i in ids if i is not None)
