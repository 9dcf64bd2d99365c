"""What a broken or hostile model brings is refused in one line, before it costs time or memory."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from harness.engine.engine import Engine
from harness.engine.request import Request
from harness.errors import InputError
from harness.models import load as models
from harness.models.gguf.header import read_header
from harness.models.template import check_template
from tests.models.files import edit_json, edit_weights, save_folder
from tests.tiny import build


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(name: object, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        models.load(str(name), "cpu", "float32")
    assert "\n" not in str(caught.value)


# Weights


@pytest.mark.parametrize(
    ("drop", "tensors", "words"),
    [
        ("layers.1", {}, r"lack model\.layers\.1\.input_layernorm\.weight and 8 more tensors"),
        ("lm_head", {}, r"lack lm_head\.weight, which"),
        ("embed_tokens", {}, r"lack model\.embed_tokens\.weight"),
        ("", {"model__layers__2__mlp__up_proj__weight": torch.ones(2)}, r"hold model\.layers\.2\.mlp\.up_proj"),
        ("", {"model__norm__weight": torch.ones(31)}, r"model\.norm\.weight has the shape \(31,\)"),
        ("", {"model__norm__weight": torch.full((32,), torch.nan)}, r"model\.norm\.weight is not finite as float32"),
        ("", {"model__norm__weight": torch.full((32,), -torch.inf)}, r"model\.norm\.weight is not finite"),
        ("", {"model__norm__weight": torch.ones(32, dtype=torch.int8)}, r"model\.norm\.weight is of type int8"),
    ],
)
def test_weights_that_do_not_fit(drop: str, tensors: dict[str, torch.Tensor], words: str, folder: Path) -> None:
    edit_weights(folder, drop, **tensors)
    refused(folder, words)


def test_weights_too_large_for_the_dtype(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=torch.full((32,), 1e6))
    models.load(str(folder), "cpu", "float32")
    with pytest.raises(InputError, match="not finite as float16"):
        models.load(str(folder), "cpu", "float16")


def test_what_follows_from_the_configuration_may_be_there(folder: Path) -> None:
    edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    models.load(str(folder), "cpu", "float32")


def test_a_tied_head_may_be_missing_but_not_differ(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "tied", tie_word_embeddings=True)
    loaded = models.load(str(folder), "cpu", "float32").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    edit_weights(folder, lm_head__weight=loaded.lm_head.weight.clone())
    models.load(str(folder), "cpu", "float32")
    edit_weights(folder, lm_head__weight=torch.zeros(64, 32))
    refused(folder, r"lm_head\.weight differs")


def test_a_snapshot_of_the_hub_is_checked_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    edit_weights(folder, "layers.1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(folder))
    refused("organisation/model", r"lack model\.layers\.1")


def test_weights_in_memory_are_no_longer_the_file(folder: Path) -> None:
    weight = models.load(str(folder), "cpu", "float32").model.model.norm.weight
    before = weight.clone()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(bytes(len(data)))
    assert torch.equal(weight, before)


# Files of the folder


def write_index(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


@pytest.mark.parametrize("name", ["../model.safetensors", "sub/model.safetensors", "/etc/hostname", "config.json", "."])
def test_an_index_names_files_of_its_folder(name: str, folder: Path) -> None:
    write_index(folder, name)
    refused(folder, "are no file of its folder")


def test_weights_do_not_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "a.safetensors").symlink_to(tmp_path / "outside.safetensors")
    write_index(folder, "a.safetensors")
    refused(folder, "are no file of its folder")
    write_index(folder, "b.safetensors")
    refused(folder, "'b.safetensors' are missing")


def test_a_snapshot_links_to_the_blobs_beside_it(folder: Path, tmp_path: Path) -> None:
    snapshot, blob = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs" / "a"
    shutil.copytree(folder, snapshot)
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert models.load(str(snapshot), "cpu", "float32").shape.layers == 2


def test_the_hash_is_of_what_was_loaded(folder: Path) -> None:
    before = models.load(str(folder), "cpu", "float32").weights_hash
    (folder / "other.safetensors").write_bytes(b"never read")
    assert models.load(str(folder), "cpu", "float32").weights_hash == before
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    write_index(folder, "part.safetensors")
    assert models.load(str(folder), "cpu", "float32").weights_hash != before


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_never_run(file: str, folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit_json(folder / file, auto_map={"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]})
    if file == "tokenizer_config.json":
        edit_json(folder / file, tokenizer_class="OwnTokenizer")
    refused(folder, f"{file} names code of its own")
    assert not (folder / "ran").exists()


# Numbers


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": True},
        {"num_hidden_layers": None},
        {"num_attention_heads": -4},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"hidden_size": "32"},
        {"hidden_size": 2**40},
        {"head_dim": 7},
        {"vocab_size": 1e3},
        {"vocab_size": -1},
        {"rms_norm_eps": float("nan")},
        {"max_position_embeddings": 2**63},
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1e300}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}},
        {"rope_parameters": "default"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "ten"}},
        {"hidden_act": "shrug"},
        {"eos_token_id": "end"},
        {"layer_types": [1, 2]},
        {"layer_types": ["chunked_attention"] * 2},
    ],
)
def test_a_configuration_of_no_model(fields: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "config.json", **fields)
    refused(folder, ".")
    refused(f"random:{folder / 'config.json'}", ".")


def test_json_that_is_too_deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "not readable as JSON")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(keys: bytes = b"", key_count: int = 1, tensors: int = 0, tail: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, key_count) + keys + tail


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(text("general.alignment") + struct.pack("<II", 4, 0)), "power of two"),
        (header(text("general.alignment") + struct.pack("<I", 8) + text("x")), "power of two"),
        (header(text("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)), "of type 9"),
        (header(text("a") + struct.pack("<IIQ", 9, 4, 2**63)), "more than"),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 2**64 - 1)), "more than"),
        (header(text("a") + struct.pack("<IQ", 8, 2**63)), "ends in its header"),
        (header(text("a") + struct.pack("<I", 99)), "of type 99"),
        (header(key_count=2**64 - 1), "more than"),
        (header(key_count=0, tensors=2**32), "more than"),
        (header(key_count=0, tensors=1, tail=text("t") + struct.pack("<I", 2**31) + bytes(64)), "dimensions"),
        (header(key_count=0, tensors=1, tail=text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**63)), "behind the end"),
        (header((text("a") + struct.pack("<II", 4, 1)) * 2, key_count=2), "twice"),
    ],
)
def test_a_gguf_header_of_no_model(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_header(tmp_path / "a.gguf")
    refused(tmp_path / "a.gguf", "not a readable GGUF file")


# Memory, vocabulary, names, templates


def test_a_model_larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=23 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    refused("random:llama-3.1-8b", r"takes 29\.9 GiB as float32; 23\.0 GiB of cpu memory are free")


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    models.load(str(save_folder(tmp_path / "equal", vocabulary=64)), "cpu")
    refused(save_folder(tmp_path / "larger", vocabulary=65), "ids up to 64, its embedding has 64 rows")


@pytest.mark.parametrize(("name", "near"), [("smolm2", "smollm2"), ("llama-3.1-8b", "random:llama-3.1-8b")])
def test_near_misses_of_own_names(name: str, near: str) -> None:
    refused(name, f"did you mean '{near}'")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "runs away"),
        ("{{ 'a' * 10 ** 10 }}", "runs away"),
        ("{{ 10 ** (10 ** 10) }}", "runs away"),
        ("{{ '%9999999999d' % 1 }}", "runs away"),
        ("{{ '{:>9999999999}'.format(1) }}", "runs away"),
        ("{{ 'a'.ljust(9999999999) }}", "runs away"),
        ("{{ 'a' | center(9999999999) }}", "runs away"),
        ("{{ range(10 ** 9) | list }}", "runs away"),
        ("{% for m in messages %}", "broken"),
    ],
)
def test_templates_that_run_away(template: str, words: str, folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, words)


def test_templates_that_end() -> None:
    chat = "{% for m in messages %}{{ m['role'] + '%s' % m['content'] | trim }}{% endfor %}{{ eos_token }}"
    refusing = "{{ raise_exception('only with a system prompt') }}"
    for template in (None, chat, refusing, {"default": chat, "tools": chat}):
        check_template("model", template, None)


# Windows


@pytest.mark.parametrize(
    ("family", "fields", "window"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 1024}, None),
        ("llama", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, None),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 64),
    ],
)
def test_only_attention_that_slides_caps_the_context(
    family: str, fields: dict[str, Any], window: int | None, folder: Path
) -> None:
    edit_json(folder / "config.json", model_type=family, **fields)
    shape = models.describe(str(folder))
    assert (shape.window, shape.max_context) == (window, window or 256)
    assert shape.context_words == (f"a sliding window of {window} tokens" if window else "a context of 256 tokens")


def test_the_engine_refuses_what_lies_beyond_the_window(tmp_path: Path) -> None:
    loaded = models.load(str(save_folder(tmp_path / "slides", "mistral", sliding_window=16)), "cpu", "float32")
    engine = Engine(loaded.model, loaded.shape)
    full = build("full", engine)
    ids = torch.ones(12, dtype=torch.long)
    assert len(list(engine.stream(full, Request(ids, 4)))) == 4
    with pytest.raises(InputError, match="17 tokens, new ones included, exceed the model's sliding window of 16"):
        list(engine.stream(full, Request(ids, 5)))
