"""FastKV, GemFilter and DuoAttention keep what their slow twins keep, on every layout of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.test_eviction import differences, distinct_ids, run
from tests.methods.test_references import Model, same_logits
from tests.reference.cuts import DuoTwin, FastOptions, FastTwin, GemOptions, full_heads, gem, gem_positions, prefill
from tests.tiny import FAMILIES, HEADS, LAYERS, build, tiny_engine, tiny_model, tiny_shape

STEPS = 4
MODELS = [(family, heads) for family in FAMILIES for heads in HEADS]
FAST: list[tuple[int, dict[str, Any]]] = [
    (100, {}),
    (100, {"kept": 0.2, "rows": 0.5, "window": 4, "kernel": 5, "pool": "avg"}),
    (290, {"kept": 64, "rows": 111}),
    (97, {"kept": 21, "rows": 13, "cut": 0, "window": 3, "kernel": 1}),
    (64, {"kept": 63, "rows": 40, "cut": 4}),
    (64, {"kept": 65, "rows": 40}),
    (40, {"kept": 1.0, "rows": 10, "cut": 2, "pool": "avg"}),
    (9, {"kept": 0.1, "rows": 0.2}),
    (5, {}),
]
"""Of shares, those that are whole numbers of tokens: the authors round them down."""


def models(cases: list[Any]) -> list[Any]:
    """Every case on three models, one of each layout; families take turns."""
    return [(*case, MODELS[(3 * turn + at) % len(MODELS)]) for turn, case in enumerate(cases) for at in (0, 4, 8)]


@pytest.mark.parametrize(("length", "options", "model"), models(FAST))
def test_fastkv(length: int, options: dict[str, Any], model: Model) -> None:
    named = {"kept": "budget", "rows": "keep"}
    asked = ":".join(["fastkv", *(f"{named.get(key, key)}={value}" for key, value in options.items())])
    method, ids = build(asked, tiny_engine(*model)), distinct_ids(length + STEPS)
    if isinstance(rows := options.get("rows"), int):
        options = options | {"rows": rows / length + 1e-9}
    twin = FastTwin(tiny_model(*model), length, len(ids), FastOptions(**{"cut": 3} | options))
    real = run(method, ids, length, model)
    same_logits(real, twin.run(ids))
    assert differences(real, twin.trace)[:3] == []
    assert list(method.tokens_kept()) == method.tokens_requested()


@pytest.mark.parametrize(
    ("length", "layer", "kept", "kernel", "model"),
    models([(120, 2, 30, 5), (333, 0, 64, 1), (70, 5, 69, 7), (17, 3, 4, 5)]),
)
def test_gemfilter(length: int, layer: int, kept: int, kernel: int, model: Model) -> None:
    method = build(f"gemfilter:budget={kept}:layer={layer}:kernel={kernel}:last=0", tiny_engine(*model))
    ids, options = distinct_ids(length + STEPS), GemOptions(layer, kept, kernel)
    chosen = gem_positions(*prefill(tiny_model(*model), ids[:length])[layer], options)
    read = method.prompt(ids[:length], tiny_engine(*model).first_layers)
    assert read.tolist() == ids[chosen].tolist()
    real = run(method, torch.cat((read, ids[length:])), kept, model)
    same_logits(real, gem(tiny_model(*model), ids, length, options))


@pytest.mark.parametrize(
    ("length", "sinks", "recent", "sparsity", "model"),
    models([(60, 4, 20, 0.5), (60, 0, 1, 0.9), (20, 5, 18, 0.25), (290, 30, 200, 0.75), (5, 2, 3, 0.5)]),
)
def test_duo(length: int, sinks: int, recent: int, sparsity: float, model: Model, tmp_path: Path) -> None:
    gates = torch.rand(LAYERS, tiny_shape(model[1]).kv_heads, generator=torch.Generator().manual_seed(length))
    file = tmp_path / "gates.tsv"
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in gates.tolist()))
    asked = f"duo:sinks={sinks}:recent={recent}:sparsity={sparsity}:heads={file}"
    method, ids = build(asked, tiny_engine(*model)), distinct_ids(length + STEPS)
    full = full_heads(gates, sparsity)
    twin = DuoTwin(tiny_model(*model), length, len(ids), full, sinks, recent)
    real = run(method, ids, length, model)
    same_logits(real, twin.run(ids))
    assert differences(real, twin.trace)[:3] == []
