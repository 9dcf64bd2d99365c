"""DuoAttention: which heads are full, and what the others keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import harness
from harness.engine.request import Request
from harness.engine.step import Heads, Step
from harness.errors import InputError
from harness.runner.catalog import parse_methods
from methods.common.gates import full_heads, reach
from methods.duo import Duo
from tests.command import run
from tests.test_cli import random_model
from tests.tiny import HEAD_DIM, HEADS, LAYERS, build, random_ids, tiny_engine, tiny_shape

PROMPT, SINKS, RECENT = 90, 3, 8
GATES = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.6], [0.3, 0.4], [1.2, -0.5], [0.05, 0.5]]
FULL = [[True, False], [False, True], [True, True], [False, False], [True, False], [False, True]]
"""Those of the greater half."""


def written(folder: Path, gates: list[list[float]]) -> Path:
    path = folder / "full_attention_heads.tsv"
    path.write_text("".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in gates))
    return path


def duo(options: str, heads: str = "GQA") -> Duo:
    method = build(f"duo:sinks={SINKS}:recent={RECENT}:{options}".rstrip(":"), tiny_engine(heads=heads))
    assert isinstance(method, Duo)
    return method


def ends(count: int) -> list[int]:
    return sorted({*range(min(SINKS, count)), *range(max(0, count - RECENT), count)})


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 11, 0.25, 0.5, 0.75, 0.99, 1.0])
def test_full_heads_are_those_from_the_quantile_on(sparsity: float) -> None:
    gates = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    threshold = np.quantile(gates.numpy(), sparsity) if sparsity < 1 else 2
    assert full_heads(gates, sparsity) == (gates.numpy() >= threshold).tolist()


def test_of_equal_gates_the_first_count_as_higher() -> None:
    assert full_heads(torch.ones(2, 3), 0.5) == [[True, True, True], [False, False, False]]
    assert full_heads(torch.tensor([[0.5, 0.5], [1.0, 0.5]]), 0.5) == [[True, False], [True, False]]


def test_heads_of_a_file_keep_everything_or_both_ends(tmp_path: Path) -> None:
    engine, method = tiny_engine(), duo(f"heads={written(tmp_path, GATES)}")
    list(engine.stream(method, Request(random_ids(PROMPT), 1)))
    few = SINKS + RECENT
    for cache, full in zip(method.cache, FULL, strict=True):
        held = [positions.tolist() for positions in cache.kept_positions()]
        assert held == [list(range(PROMPT)) if whole else ends(PROMPT) for whole in full]
    assert method.tokens_requested() == [-(-(PROMPT + few) // 2), 51, PROMPT, few, 51, 51]
    assert method.tokens_kept() == [50.5, 50.5, PROMPT, few, 50.5, 50.5]
    assert method.kv_bytes() == 6 * (PROMPT + few + 2) * 2 * HEAD_DIM * 4  # a spare token each
    assert method.notes() == {"head_roles": "file", "full_heads": 6}


@pytest.mark.parametrize("length", [4, 11, 12, PROMPT])
def test_streaming_heads_slide_with_every_token(length: int, tmp_path: Path) -> None:
    engine, method = tiny_engine(), duo(f"heads={written(tmp_path, GATES)}")
    list(engine.stream(method, Request(random_ids(length), 15)))
    for cache, full in zip(method.cache, FULL, strict=True):
        for positions, whole in zip(cache.kept_positions(), full, strict=True):
            seen = length + 14
            # What comes in one by one leaves one by one: of a short prompt no token is lost too early.
            assert positions.tolist() == (list(range(seen)) if whole else ends(seen))


@torch.inference_mode()
def test_a_question_sees_all_that_was_held_and_itself(tmp_path: Path) -> None:
    engine, method, late = tiny_engine(), duo(f"heads={written(tmp_path, GATES)}"), 9
    ids = random_ids(PROMPT)
    method.begin(PROMPT - late, late)
    engine.forward(method, ids[:-late], Step("prefill", 0, PROMPT - late))
    held = method.cache[0].heads()[1]  # streams
    q, k, v = (torch.randn(late, count, HEAD_DIM) for count in (4, 2, 2))
    heads = Heads(q, k, v, torch.arange(PROMPT - late, PROMPT))
    keys, values = torch.cat((held.keys, heads.k[:, 1])), torch.cat((held.values, heads.v[:, 1]))
    out = method.attend(0, heads, Step("decode", PROMPT - late, late)).view(late, 4, HEAD_DIM)
    for row in range(late):
        seen = SINKS + RECENT + row + 1
        weights = (keys[:seen] @ heads.q[row, 2] / HEAD_DIM**0.5).softmax(0)
        torch.testing.assert_close(out[row, 2], weights @ values[:seen])
    assert method.cache[0].kept_positions()[1].tolist() == ends(PROMPT)


@pytest.mark.parametrize("heads", HEADS)
def test_the_score_is_the_area_under_the_mean_querys_cumulated_attention(heads: str) -> None:
    engine = tiny_engine(heads=heads)
    move, projected = engine.context.move, engine.first_layers(random_ids(40), 2)
    query, key = (move(x, -projected.positions).mean(0) for x in (projected.q, projected.k))
    group, wanted = len(query) // len(key), torch.zeros(len(key))
    for head, mean in enumerate(query):
        # Rotations depend on distances alone: the query stays at 0, and key j stands 499 - j before it.
        back = torch.arange(500) - 499
        logits = move(key[head // group].expand(500, 1, -1), back)[:, 0] @ mean / HEAD_DIM**0.5
        wanted[head // group] += logits.softmax(0).cumsum(0).mean() / group
    torch.testing.assert_close(reach(projected, move), wanted, atol=1e-4, rtol=1e-4)


def test_without_a_file_heads_are_rated_on_the_prompt() -> None:
    engine, method, ids = tiny_engine(), duo("sparsity=0.25"), random_ids(PROMPT)
    list(engine.stream(method, Request(ids, 1)))
    scores = torch.stack([reach(engine.first_layers(ids, layer), engine.context.move) for layer in range(LAYERS)])
    assert method.full == full_heads(scores, 0.25)
    assert method.notes() == {"head_roles": "training-free score", "full_heads": 9}
    held = [[len(head.keys) for head in cache.heads()] for cache in method.cache]
    assert held == [[PROMPT if full else SINKS + RECENT for full in layer] for layer in method.full]
    assert method.kv_bytes() == (9 * PROMPT + 3 * (SINKS + RECENT) + 12) * 2 * HEAD_DIM * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "heads: cannot be read: No such file"),
        ("0.5\t1\n0.5\n", "heads: expected a row a layer, with as many numbers in each"),
        ("", "heads: expected a row a layer"),
        ("0.5\t0.5\n0.5 0.5\n", "heads: line 2: expected numbers with tabs between them"),
        ("0.5\tnan\n", "heads: line 1: expected numbers"),
        ("0.5\t0.5\n" * 5, "heads has gates for 5 layers of 2 KV heads; the model has 6 of 2"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_a_model_loads(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "gates.tsv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        parse_methods(f"duo:heads={path}")[0].check(tiny_shape())


def test_what_is_in_the_file_identifies_a_run_and_its_path_is_not_recorded(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    path, folder = written(tmp_path / "secret", GATES), tmp_path / "run"
    asked = ["--methods", f"duo:heads={path}", "--tasks", "speed:lengths=64:new_tokens=2:repeats=1"]
    command = ["run", "--model", random_model(tmp_path), *asked, "--output", str(folder)]
    assert run(*command) == 0
    assert set(harness.load(folder).method) == {"duo:heads=full_attention_heads.tsv"}
    assert all("secret" not in (folder / name).read_text() for name in ("manifest.json", "samples.jsonl"))
    written(tmp_path / "secret", GATES[::-1])
    assert run(*command) == 2  # a run goes on only where everything that shapes its answers is unchanged


def test_files_of_one_name_need_names_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    asked = ",".join(f"duo:heads={written(tmp_path / name, GATES)}" for name in ("a", "b"))
    with pytest.raises(InputError, match="two different methods are called"):
        parse_methods(asked)
