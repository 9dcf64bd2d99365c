"""What configurations and headers may say: types, sizes and counts, checked before anything is made of them.

The upper bounds lie far above every published model; they keep a broken or malicious file from taking minutes and
gigabytes before it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.errors import InputError

# Bytes of a configuration; tokenizers are larger and read by their library.
MAX_JSON = 2**24
# Rotation by the length of the sequence could not be reproduced after pruning.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

Width = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=2**12)]
Tokens = Annotated[int, Field(ge=1, le=2**27)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]
Positive = Annotated[float, Field(gt=0)]
Ends = TokenId | list[TokenId] | None


class _Strict(BaseModel):
    """Fields of these types, no text for numbers; whatever else a file holds is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class ConfigFields(_Strict):
    """The fields of a config.json that shape what runs; an optional one has transformers' default."""

    model_type: Annotated[str, Field(max_length=100)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    hidden_size: Width
    intermediate_size: Width
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=2, le=2**12, multiple_of=2)] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    max_position_embeddings: Tokens = 1
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    rope_theta: Positive | None = None
    sliding_window: Tokens | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=2**20)] | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: Annotated[str, Field(max_length=100)] = "silu"
    bos_token_id: Ends = None
    eos_token_id: Ends = None
    pad_token_id: Annotated[int, Field(ge=-1, lt=2**24)] | None = None

    @model_validator(mode="after")
    def _heads_share_out(self) -> ConfigFields:
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            kv = self.num_key_value_heads
            raise ValueError(f"{self.num_attention_heads} attention heads cannot share {kv} key/value heads evenly")
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} makes no {self.num_attention_heads} heads of even width")
        return self


class Rope(_Strict):
    """How positions are rotated, as transformers writes it down when it has read a configuration."""

    rope_type: str
    rope_theta: Annotated[float, Field(ge=1, le=1e12)]
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    original_max_position_embeddings: Tokens | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Rope:
        if missing := [name for name in _ROPE_NEEDS[self.rope_type] if getattr(self, name) is None]:
            raise ValueError(f"type {self.rope_type!r} needs {', '.join(missing)}")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must lie below high_freq_factor")
        return self


class GgufFields(_Strict):
    """The metadata of a GGUF file that is not the architecture's own."""

    architecture: Annotated[str, Field(alias="general.architecture", max_length=100)]
    parts: int = Field(1, alias="split.count")
    tokens: list[str] = Field(alias="tokenizer.ggml.tokens", min_length=1)
    merges: list[str] = Field([], alias="tokenizer.ggml.merges")
    kinds: list[int] = Field([], alias="tokenizer.ggml.token_type")
    model: str = Field(alias="tokenizer.ggml.model")
    pre: str | None = Field(None, alias="tokenizer.ggml.pre")
    adds_bos: bool | None = Field(None, alias="tokenizer.ggml.add_bos_token")
    template: str | None = Field(None, alias="tokenizer.chat_template")
    bos: TokenId | None = Field(None, alias="tokenizer.ggml.bos_token_id")
    eos: TokenId | None = Field(None, alias="tokenizer.ggml.eos_token_id")
    eot: TokenId | None = Field(None, alias="tokenizer.ggml.eot_token_id")
    eom: TokenId | None = Field(None, alias="tokenizer.ggml.eom_token_id")
    unknown: TokenId | None = Field(None, alias="tokenizer.ggml.unknown_token_id")
    padding: TokenId | None = Field(None, alias="tokenizer.ggml.padding_token_id")

    @model_validator(mode="after")
    def _ids_are_tokens(self) -> GgufFields:
        for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            if (index := getattr(self, role)) is not None and index >= len(self.tokens):
                raise ValueError(f"the {role} token {index} lies outside the vocabulary of {len(self.tokens)}")
        return self


def check(kind: type[BaseModel], owner: str, fields: Mapping[str, Any]) -> None:
    """Refuses fields that are missing, of another type, or out of bounds.

    Args:
        kind: what they must be.
        owner: whose they are, for the error.
        fields: as read.

    Raises:
        InputError: the first that is wrong, with what was expected.
    """
    try:
        kind.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"][:1])
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{owner}: {f'{path}: ' if path else ''}{reason}{_shown(first, path)}") from None


def _shown(error: Any, path: str) -> str:
    value = error["input"]
    return f", not {str(value)[:40]!r}" if path and isinstance(value, str | int | float) else ""


def check_rope(owner: str, rope: Mapping[str, Any]) -> None:
    """Refuses rotations that are unknown, depend on the sequence's length, or whose numbers make no sense.

    Raises:
        InputError: says which.
    """
    kind = rope.get("rope_type")
    if kind in LENGTH_DEPENDENT_ROPE:
        raise InputError(f"{owner} rotates by sequence length (rope type {kind!r}), which pruning would change")
    if kind not in list(_ROPE_NEEDS):
        raise InputError(f"{owner} has the unknown rope type {str(kind)[:40]!r}; supported: {', '.join(_ROPE_NEEDS)}")
    check(Rope, f"{owner}: rope", rope)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of no more than `MAX_JSON` bytes.

    Raises:
        InputError: not readable, no JSON, no object, too deep or too large.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise InputError(f"{path} has more than {MAX_JSON // 2**20} MiB, so it is no configuration")
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no JSON object")
    return fields
