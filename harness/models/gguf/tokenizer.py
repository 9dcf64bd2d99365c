"""Tokenizers out of GGUF metadata.

Transformers' own converter reads the vocabulary but guesses the rest: it takes the beginning token for the end token,
sets no padding, and splits every LLaMA-architecture text as GPT-2 does, whatever `tokenizer.ggml.pre` says, so that
blanks and numbers come out as tokens that the model never saw there. So the tokenizer is put together here, from what
the file says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import InputError
from harness.models.weightless import last_line, transformers

# llama.cpp's token types
CONTROL, USER_DEFINED = 3, 4

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Dialect:
    """What `tokenizer.ggml.pre` stands for.

    Attributes:
        pattern: regular expression of the pieces that BPE works in; None for GPT-2's, with digits apart.
        ends: tokens that end an answer beside the one that the metadata names.
        adds_bos: whether texts start with the beginning token where the metadata does not say.
        nfc: whether text is normalised to NFC.
        whole_words: whether a piece that is in the vocabulary skips the merges.
    """

    pattern: str | None
    ends: tuple[str, ...] = ()
    adds_bos: bool = False
    nfc: bool = False
    whole_words: bool = False


_LLAMA3 = Dialect(
    _WORDS.format(digits=r"\p{N}{1,3}"),
    ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
    adds_bos=True,
    whole_words=True,
)
_QWEN2 = Dialect(_WORDS.format(digits=r"\p{N}"), ("<|im_end|>", "<|endoftext|>"), nfc=True)

DIALECTS = {"smollm": Dialect(None), "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}


def dialect_of(metadata: Mapping[str, Any]) -> Dialect:
    """How the file's tokenizer splits text.

    Raises:
        InputError: not a byte-level BPE tokenizer, or a way of splitting that is not known here.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in DIALECTS:
        raise InputError(
            f"GGUF tokenizer {kind}/{pre} is not supported (gpt2/{', gpt2/'.join(DIALECTS)} are); "
            "use the model's Hugging Face folder instead"
        )
    return DIALECTS[pre]


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end an answer, the metadata's own one first."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = metadata["tokenizer.ggml.tokens"]
    known = [tokens.index(end) for end in dialect_of(metadata).ends if end in tokens]
    return list(dict.fromkeys(int(i) for i in [*named, *known] if i is not None))


def build_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """A `PreTrainedTokenizerFast` of the file's vocabulary, merges, special tokens and chat template.

    Raises:
        InputError: see `dialect_of`, or merges and vocabulary that do not fit together.
    """
    dialect = dialect_of(metadata)
    context = metadata.get(f"{metadata['general.architecture']}.context_length")
    try:
        tokenizer = transformers().PreTrainedTokenizerFast(
            tokenizer_object=_backend(metadata, dialect),
            clean_up_tokenization_spaces=False,
            model_max_length=context,
            **_special_names(metadata),
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"the GGUF file's tokenizer is broken: {last_line(error)}") from None
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _backend(metadata: Mapping[str, Any], dialect: Dialect) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers

    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.merges", [])
    tokenizer = Tokenizer(_bpe(tokens, merges, dialect.whole_words))
    tokenizer.pre_tokenizer = _pre_tokenizer(dialect)
    tokenizer.decoder = decoders.ByteLevel()
    if dialect.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = _post_processor(metadata, dialect)
    tokenizer.add_special_tokens(list(_added(metadata, CONTROL)))
    tokenizer.add_tokens(list(_added(metadata, USER_DEFINED)))
    return tokenizer


def _bpe(tokens: list[str], merges: list[str], whole_words: bool) -> Any:
    from tokenizers.models import BPE

    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    return BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words)


def _pre_tokenizer(dialect: Dialect) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits: Any = pre_tokenizers.Digits(individual_digits=True)
    if dialect.pattern is not None:
        splits = pre_tokenizers.Split(Regex(dialect.pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=dialect.pattern is None)
    return pre_tokenizers.Sequence([splits, to_bytes])


def _post_processor(metadata: Mapping[str, Any], dialect: Dialect) -> Any:
    from tokenizers import processors

    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", dialect.adds_bos):
        return processors.ByteLevel(trim_offsets=False)
    name = metadata["tokenizer.ggml.tokens"][bos]
    return processors.TemplateProcessing(single=f"{name} $A", pair=f"{name} $A $B", special_tokens=[(name, bos)])


def _added(metadata: Mapping[str, Any], kind: int) -> Iterator[Any]:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type", [])
    for token, found in zip(metadata["tokenizer.ggml.tokens"], types, strict=False):
        if found == kind:
            yield AddedToken(token, normalized=False, special=kind == CONTROL)


def _special_names(metadata: Mapping[str, Any]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    return {role: tokens[i] for role, i in ids.items() if i is not None}
