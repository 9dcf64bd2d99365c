"""Models out of `.gguf` files, dequantised tensor by tensor.

Transformers reads GGUF too, but only with accelerate installed, parses a header four times at six seconds each, and
drops the long-context frequencies of LLaMA 3 (`rope_freqs`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.parallel import ALONE, Ranks
from harness.errors import InputError, MissingPackage
from harness.models.gguf.header import TensorInfo, read_header
from harness.models.gguf.tokenizer import build_tokenizer, end_ids
from harness.models.limits import ConfigFields, GgufFields, check, check_rope
from harness.models.weightless import config_for, last_line
from harness.models.weights import fill
from harness.storage.user_cache import file_digest

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Transformers would fill these in with the sizes of some 7 B model.
_REQUIRED = set(_FIELDS.values()) - {"vocab_size", "head_dim", "num_key_value_heads"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"


@lru_cache(maxsize=1)
def _header(path: Path, size: int, modified: int) -> tuple[Mapping[str, Any], Mapping[str, TensorInfo]]:
    # A run asks for the shape before the model; a vocabulary takes half a second to read.
    return read_header(path)


class GgufFile:
    """One GGUF file.

    Attributes:
        path: the file.
        metadata: its keys and values.
        tensors: what it holds, by ggml's names; no weights are read.
    """

    latency_only = False

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            InputError: not a GGUF file, cut short, or one part of several.
        """
        self.path = path
        try:
            facts = path.stat()
            self.metadata, self.tensors = _header(path.resolve(), facts.st_size, facts.st_mtime_ns)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable GGUF file: {error}") from None
        check(GgufFields, str(path), self.metadata)
        if self.metadata.get("split.count", 1) > 1:
            raise InputError(f"{path} is one part of several; join them with llama.cpp's gguf-split --merge")

    def config(self) -> Any:
        """The transformers configuration that the metadata describes.

        Raises:
            InputError: an architecture or a tokenizer that is not supported, or metadata that lacks a number.
        """
        family = self.metadata.get("general.architecture")
        if family not in ARCHITECTURES:
            raise InputError(f"{self.path} is of architecture {family!r}; supported: {', '.join(ARCHITECTURES)}")
        given = {field: self.metadata.get(f"{family}.{key}") for key, field in _FIELDS.items()}
        fields = {field: value for field, value in given.items() if value is not None}
        if missing := _REQUIRED - fields.keys():
            raise InputError(f"{self.path} lacks {', '.join(sorted(missing))} in its metadata")
        fields |= self._derived_fields(family)
        check(ConfigFields, str(self.path), {"model_type": family, **fields})
        check_rope(str(self.path), fields["rope_parameters"])
        return config_for(family, fields)

    def tokenizer(self, config: Any) -> Any:
        """The tokenizer that the metadata describes; needs no gguf package.

        Raises:
            InputError: one that is not supported.
        """
        return build_tokenizer(self.metadata)

    def load(self, config: Any, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Any:
        """The model.

        Raises:
            InputError: the gguf package is missing, or the file holds tensors that the architecture has no place for.
        """
        names = {self._torch_name(name): name for name in self.tensors if name != _FREQUENCIES}
        shapes = {torch_name: self.tensors[name].shape for torch_name, name in names.items()}
        read = partial(self._weights_of, names, config)
        model = fill(str(self.path), config, shapes, read, device, dtype, ranks)
        self._scale_frequencies(model)
        return model

    def weights_hash(self) -> str:
        """Sha256 (hex) of the file."""
        return file_digest(self.path)

    def _derived_fields(self, family: str) -> dict[str, Any]:
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        return {
            "vocab_size": self.metadata.get(f"{family}.vocab_size", len(tokens)),
            "num_key_value_heads": self.metadata.get(f"{family}.attention.head_count_kv")
            or self.metadata.get(f"{family}.attention.head_count"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "rope_parameters": self._rope(family),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": end_ids(self.metadata),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        } | ({"attention_bias": True} if family == "llama" and "blk.0.attn_q.bias" in self.tensors else {})

    def _rope(self, family: str) -> dict[str, Any]:
        scaling = f"{family}.rope.scaling"
        kind = self.metadata.get(f"{scaling}.type", "none")
        rope = {"rope_theta": self.metadata.get(f"{family}.rope.freq_base", 10000.0)}
        if kind == "none":
            return rope | {"rope_type": "default"}
        trained = self.metadata.get(f"{scaling}.original_context_length")
        original = {} if trained is None else {"original_max_position_embeddings": trained}
        return rope | original | {"rope_type": kind, "factor": self.metadata.get(f"{scaling}.factor", 1.0)}

    def _weights_of(self, names: Mapping[str, str], config: Any, name: str) -> Tensor:
        return self._weights(names[name], config)

    def _weights(self, name: str, config: Any) -> Tensor:
        tensor = self._read(self.tensors[name])
        if config.model_type == "llama" and (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.\w+", name)):
            return _unpermuted(tensor, config.num_attention_heads if match[1] == "q" else config.num_key_value_heads)
        return tensor

    def _torch_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, stem, kind = match.groups() if match else (None, name, "")
        known = (_TOP if layer is None else _IN_LAYER).get(stem)
        if known is None:
            raise InputError(f"{self.path} holds a tensor {name!r}, which none of the supported models has")
        return f"{known}.{kind}" if layer is None else f"model.layers.{layer}.{known}.{kind}"

    def _scale_frequencies(self, model: Any) -> None:
        # LLaMA 3 files carry their context extension as one divisor a frequency, not as numbers in the metadata.
        if (info := self.tensors.get(_FREQUENCIES)) is not None:
            frequencies = model.model.rotary_emb.inv_freq
            divisors = self._divisors(info, frequencies.shape)
            frequencies.div_(divisors.to(frequencies.device))

    def _divisors(self, info: TensorInfo, shape: torch.Size) -> Tensor:
        divisors = self._read(info) if info.shape == shape else torch.zeros(1)
        if not bool(((divisors > 0) & divisors.isfinite()).all()):
            raise InputError(f"{self.path}: {_FREQUENCIES} must hold {shape.numel()} finite numbers above 0")
        return divisors

    def _read(self, info: TensorInfo) -> Tensor:
        numpy, gguf = _packages()
        try:
            kind = gguf.GGMLQuantizationType(info.kind)
            shape = gguf.quant_shape_to_byte_shape(info.shape, kind)
            stored = numpy.memmap(self.path, numpy.uint8, "r", offset=info.offset, shape=shape)
            with numpy.errstate(all="ignore"):  # what is not finite is refused by name later
                values = gguf.dequantize(stored, kind)
        except (NotImplementedError, ValueError, OverflowError, OSError) as error:
            raise InputError(f"{self.path} cannot be dequantised: {last_line(error)}") from None
        return torch.from_numpy(numpy.array(values, dtype=numpy.float32))


def _packages() -> tuple[Any, Any]:
    try:
        import gguf
        import numpy
    except ImportError as error:
        raise MissingPackage(f"GGUF models need the package {error.name}; pip install gguf") from None
    return numpy, gguf


def _unpermuted(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order of transformers, [heads * head_dim, ...].

    llama.cpp rotates neighbouring channels, transformers rotates the two halves of a head.
    """
    rest = tensor.shape[1:]
    return tensor.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(tensor.shape)
