"""LycheeDecode: who looks for tokens, what the others read, and what that costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.engine.engine import Engine
from harness.engine.request import Request
from harness.errors import InputError
from harness.runner.catalog import parse_methods
from methods.common import gates as gates_module
from methods.lychee import Lychee
from tests.methods.test_duo import written
from tests.methods.test_eviction import distinct_ids
from tests.methods.test_eviction import run as traced
from tests.methods.test_references import Model, same_logits
from tests.reference.lychee import LycheeTwin, retrieval_heads, spaced_layers
from tests.tiny import (
    FAMILIES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    build,
    last_logits,
    random_ids,
    tiny_engine,
    tiny_model,
    tiny_shape,
)

STEPS = 5
CASES: list[tuple[int, int | float, float | None, str]] = [
    (90, 20, 0.4, "mean"), (90, 20, 0.4, "max"), (120, 0.1, 0.6, "mean"), (40, 42, 0.25, "mean"), (60, 2, 0.3, "max"),
    (30, 1.0, 0.2, "mean"), (50, 9, 0.0, "mean"), (12, 100, 0.5, "max"),
    (80, 25, None, "mean"),
]  # fmt: skip
"""Prompt, budget, share of retrieval heads, vote; the fourth outgrows its budget in decode."""


def gates(kv_heads: int, seed: int = 0) -> list[list[float]]:
    drawn: list[list[float]] = torch.rand(LAYERS, kv_heads, generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def lychee(text: str, engine: Engine) -> Lychee:
    method = build(f"lychee:{text}", engine)
    assert isinstance(method, Lychee)
    return method


@pytest.mark.parametrize(
    ("length", "budget", "share", "vote", "model"),
    [
        (*case, (FAMILIES[(turn + at) % len(FAMILIES)], heads))
        for turn, case in enumerate(CASES)
        for at, heads in enumerate(HEADS)
    ],
)
def test_it_answers_as_its_twin(
    length: int, budget: int | float, share: float | None, vote: str, model: Model, tmp_path: Path
) -> None:
    table = gates(tiny_shape(model[1]).kv_heads, length)
    full, written_budget = retrieval_heads(table, share), int(budget) if budget == 1 else budget
    chosen = "" if share is None else f":retrieval={share}"
    asked = f"budget={written_budget}{chosen}:vote={vote}:heads={written(tmp_path, table)}"
    method, ids = lychee(asked, tiny_engine(*model)), distinct_ids(length + STEPS)
    assert method.retrieves == full
    twin = LycheeTwin(tiny_model(*model), length, len(ids), budget, full, vote)
    same_logits(traced(method, ids, length, model), twin.run(ids))


@pytest.mark.parametrize("share", [0.0, 0.17, 0.34, 0.5, 1.0])
def test_without_a_file_layers_look_for_tokens_evenly_spaced(share: float) -> None:
    engine, looking = tiny_engine(), spaced_layers(LAYERS, share)
    method, ids = lychee(f"budget=20:retrieval={share}", engine), distinct_ids(80 + STEPS)
    assert method.retrieves == [[layer in looking] * 2 for layer in range(LAYERS)] and 0 in looking
    twin = LycheeTwin(tiny_model(), 80, len(ids), 20, method.retrieves)
    same_logits(traced(method, ids, 80, FAMILIES_FIRST), twin.run(ids))
    assert method.notes() == {"head_roles": "evenly spaced layers", "retrieval_heads": 2 * len(looking)}


FAMILIES_FIRST: Model = (FAMILIES[0], "GQA")


def test_less_is_read_and_everything_is_kept(tmp_path: Path) -> None:
    engine = tiny_engine()
    method = lychee(f"budget=20:retrieval=0.34:heads={written(tmp_path, gates(2))}", engine)
    list(engine.stream(method, Request(random_ids(100), 3)))
    head, count = 2 * HEAD_DIM * 4, sum(map(sum, method.retrieves))
    assert 2 < count < 2 * LAYERS and method.tokens_kept() == [100] * LAYERS
    assert method.decode_bytes() == head * (count * 102 + (2 * LAYERS - count) * 20)
    assert method.kv_bytes() == LAYERS * 2 * (100 + 3) * head and method.extra_bytes() == 0
    assert method.notes() == {"head_roles": "file", "retrieval_heads": count}


def test_a_cache_that_fits_the_budget_is_read_whole() -> None:
    engine = tiny_engine()
    method, full = lychee("budget=64", engine), build("full", engine)
    assert list(engine.stream(method, Request(random_ids(60), 4))) == list(
        engine.stream(full, Request(random_ids(60), 4))
    )
    assert method.decode_bytes() == full.decode_bytes()


def test_each_token_of_a_question_goes_by_its_own_sets() -> None:
    engine, ids, late = tiny_engine(), random_ids(80), 7
    together, alone = (lychee("budget=12:retrieval=0.34", engine) for _ in range(2))
    logits = [last_logits(engine, method, ids, late, size) for method, size in ((together, late), (alone, 1))]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("model", "layers", "heads"), [("smollm2", 30, 3), ("qwen2.5-coder-1.5b", 28, 2)])
@pytest.mark.parametrize("name", ["duo", "lychee"])
def test_gates_of_two_models_come_along(name: str, model: str, layers: int, heads: int) -> None:
    (spec,) = parse_methods(f"{name}:heads={model}")
    rows = spec.options.heads.rows  # type: ignore[attr-defined]
    assert spec.label == f"{name}:heads={model}" and {len(row) for row in rows} == {heads} and len(rows) == layers
    spec.check(replace(tiny_shape(), layers=layers, kv_heads=heads, heads=3 * heads))
    file = Path(gates_module.__file__).parents[1] / "data" / f"{name}-{model}.tsv"
    ahead = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(f"harness calibrate {name} " in line for line in ahead)


def test_gates_of_another_model_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, gates(2)[:5])
    with pytest.raises(InputError, match="lychee: heads has gates for 5 layers of 2 KV heads; the model has 6 of 2"):
        parse_methods(f"lychee:heads={path}")[0].check(tiny_shape())
