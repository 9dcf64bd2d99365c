"""Small damage to files, with a fixed seed: a model loads or is refused in one line, and soon."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.models import load as models
from tests.models.files import FIELDS, save_folder
from tests.models.test_models import tiny_model, write_gguf

SECONDS = 3.0
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF)
VALUES: tuple[Any, ...] = (0, -1, 1, 3, 2**31, 2**63, 1e30, 0.5, True, None, "", "default", [], [1], {}, {"a": [[]]})


def survives(name: str, act: Callable[[str], object]) -> None:
    start = time.perf_counter()
    try:
        act(name)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    assert time.perf_counter() - start < SECONDS


def load(name: str) -> object:
    return models.load(name, "cpu", "float32")


def damaged(data: bytes, end: int, dice: random.Random) -> bytes:
    """A copy with one to eight bytes in a row changed, inserted or removed before `end`."""
    copy, place, count = bytearray(data), dice.randrange(end), dice.choice((1, 2, 4, 8))
    fresh = bytes(dice.choice(NUMBERS) for _ in range(count))
    kind = dice.random()
    copy[place : place + (0 if kind < 0.1 else count)] = b"" if kind > 0.9 else fresh
    return bytes(copy)


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_damaged_gguf_files(tmp_path: Path) -> None:
    path, dice = tmp_path / "tiny.gguf", random.Random(1)
    write_gguf(path, tiny_model("llama"), "smollm")
    whole = path.read_bytes()
    places = whole.index(b"tokenizer.ggml.tokens"), whole.index(b"tokenizer.ggml.merges"), whole.index(b"blk.0")
    for number in range(120):
        # The vocabulary is most of the header and all alike: begin before it, or behind it.
        start, end = ((0, places[0] + 40), (places[1], places[2] + 400))[number % 2]
        path.write_bytes(whole[:start] + damaged(whole[start:], end - start, dice))
        survives(str(path), load if number % 4 == 0 else models.describe)


def test_damaged_safetensors_headers(tmp_path: Path) -> None:
    folder, dice = save_folder(tmp_path / "model"), random.Random(2)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for number in range(40):
        path.write_bytes(damaged(whole, 8 if number % 4 == 0 else end, dice))
        survives(str(folder), load)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_damaged_configurations(family: str, tmp_path: Path) -> None:
    folder, dice = save_folder(tmp_path / "model", family), random.Random(3)
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    keys = sorted({*whole, *FIELDS, "rope_parameters", "sliding_window", "layer_types", "head_dim"})
    for number in range(60):
        chosen = {dice.choice(keys): dice.choice(VALUES) for _ in range(dice.choice((1, 1, 2)))}
        path.write_text(json.dumps(whole | chosen))
        survives(str(folder), load if number % 4 == 0 else models.describe)
        survives(f"random:{path}", models.describe)


def test_damaged_tokenizers(tmp_path: Path) -> None:
    folder, dice = save_folder(tmp_path / "model"), random.Random(4)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        whole = (folder / name).read_bytes()
        for _ in range(6):
            (folder / name).write_bytes(damaged(whole, len(whole), dice))
            survives(str(folder), load)
        (folder / name).write_bytes(whole)
