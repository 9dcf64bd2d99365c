"""The parts of methods that keep few keys and values, each against its formula written out."""

from __future__ import annotations

import pytest
import torch

from harness.engine.attention import Attention
from harness.engine.request import Request
from harness.engine.step import Step
from harness.errors import InputError
from harness.runner.catalog import parse_methods
from methods.common.evicting import Evicting
from methods.common.future import expected_logits, future_queries, turns
from methods.common.scores import attention_sums, output_norms
from methods.keydiff import unlikeness
from tests.tiny import build, random_ids, tiny_engine, tiny_shape

KV_HEADS, GROUP, D = 2, 3, 8
PROMPT, BUDGET = 90, 40


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Whole causal matrices, [heads, n, n]."""
    logits = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(GROUP, 1)) / D**0.5
    return logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -torch.inf).softmax(2)  # type: ignore[no-any-return]


def begun(text: str, prompt_len: int = PROMPT, new_tokens: int = 8) -> Evicting:
    method = build(text, tiny_engine())
    assert isinstance(method, Evicting)
    method.begin(prompt_len, new_tokens)
    return method


@pytest.mark.parametrize("first", [0, 1, 100, 199])
@pytest.mark.parametrize("known", [False, True])
def test_sums_of_attention_are_those_of_the_whole_matrix(first: int, known: bool) -> None:
    q, k = normal(200, KV_HEADS * GROUP, D), normal(200, KV_HEADS, D, seed=1)
    norms = Attention().normalised(q[None], k[None], k[None])[1][0, first:] if known else None
    whole = attention(q, k)[:, first:].sum(1).view(KV_HEADS, GROUP, -1).mean(1)
    assert torch.allclose(attention_sums(q[first:], k, norms), whole, atol=1e-4)


def test_what_values_add_is_measured_behind_each_heads_part_of_the_projection() -> None:
    v, weight = normal(5, KV_HEADS, D), normal(20, KV_HEADS * GROUP * D, seed=1)
    norms = output_norms(v, [weight])
    other = normal(20, KV_HEADS * GROUP * D, seed=2)
    both = output_norms(torch.cat((v, v), 1), [other, weight])
    assert torch.equal(both[KV_HEADS:], norms) and torch.equal(both[:KV_HEADS], output_norms(v, [other]))
    for head in range(KV_HEADS):
        parts = [weight[:, at * D : (at + 1) * D] for at in range(head * GROUP, (head + 1) * GROUP)]
        each = torch.stack([(v[:, head] @ part.T).abs().sum(1) for part in parts])
        assert torch.allclose(norms[head], each.mean(0), rtol=1e-5)


def test_queries_to_come_are_the_prompts_at_the_positions_to_come() -> None:
    move, start, horizon = tiny_engine().context.move, 4, 32
    plain, positions = normal(40, 2, 16) + 1, torch.arange(start, start + 40)
    rotated = move(plain, positions)
    mean, covariance = future_queries(rotated, turns(rotated, positions, move, horizon))
    ahead = start + 40 + torch.arange(horizon)
    turn = torch.stack([move(torch.eye(16).expand(horizon, 16, 16), ahead)[at] for at in range(horizon)]).mean(0)
    for head in range(2):
        assert torch.allclose(mean[head], plain[:, head].mean(0) @ turn, atol=1e-5)
        assert torch.allclose(covariance[head], (plain[:, head] @ turn).T.cov(correction=0), atol=1e-5)


def test_expected_logits_are_of_the_mean_of_exponentials() -> None:
    k, spread = normal(6, 1, D), 0.5 * normal(1, D, D, seed=1)
    mean, covariance = normal(1, D, seed=2), spread.transpose(1, 2) @ spread
    drawn = mean + normal(400_000, D, seed=3) @ spread[0]
    sampled = (drawn @ k[:, 0].T / D**0.5).exp().mean(0).log()
    assert torch.allclose(expected_logits(k, mean, covariance)[0, 0], sampled, atol=0.02)
    assert torch.allclose(expected_logits(k, mean, None)[0, 0], mean[0] @ k[:, 0].T / D**0.5, atol=1e-5)


def test_unlikeness_orders_as_the_cosine_to_the_mean() -> None:
    k = normal(50, KV_HEADS, D) + 1
    unit = torch.nn.functional.normalize(k, dim=2)
    cosine = torch.nn.functional.cosine_similarity(k, unit.mean(0, keepdim=True), dim=2)
    assert torch.equal(unlikeness(unit).argsort(1), (-cosine).T.argsort(1))


@pytest.mark.parametrize(
    ("prompt_len", "budget", "expected"),
    [
        (1000, 132, [227, 189, 151, 113, 75, 37]),  # B = 100: from 195 to 5 in steps of 190 // 5 = 38, and 32
        (205, 132, [205, 176, 147, 118, 89, 60]),  # the first layer can get no more than the prompt: 173, then 27
        (199, 132, [132] * 6),
        (100, 132, [100] * 6),
    ],
)
def test_the_pyramid(prompt_len: int, budget: int, expected: list[int]) -> None:
    assert begun(f"pyramidkv:budget={budget}", prompt_len).tokens_requested() == expected


def test_a_pyramid_of_one_layer_is_no_higher_than_its_budget() -> None:
    method = build("pyramidkv:budget=132", tiny_engine(layers=1))
    method.begin(1000, 1)
    assert method.tokens_requested() == [132]


@pytest.mark.parametrize("text", ["tova", "h2o:mode=drop:window=8"])
def test_late_tokens_come_in_one_by_one_and_never_exceed_the_budget(text: str) -> None:
    engine, ids, late = tiny_engine(), random_ids(PROMPT + 7), 7
    together, alone = (begun(f"{text}:budget={BUDGET}", PROMPT, late) for _ in range(2))
    for method, pieces in ((together, [ids[PROMPT:]]), (alone, ids[PROMPT:].split(1))):  # type: ignore[no-untyped-call]
        engine.forward(method, ids[:PROMPT], Step("prefill", 0, PROMPT))
        start = PROMPT
        for piece in pieces:
            engine.forward(method, piece, Step("decode", start, len(piece)))
            start += len(piece)
    for ours, theirs in zip(together.cache, alone.cache, strict=True):
        assert ours.length == BUDGET and torch.equal(ours.positions, theirs.positions)


def test_a_cache_below_its_budget_fills_up_first() -> None:
    engine = tiny_engine()
    method = build("tova:budget=93", engine)
    list(engine.stream(method, Request(random_ids(PROMPT), 8)))
    assert [cache.length for cache in method.cache] == [93] * 6
    assert method.tokens_requested() == [PROMPT] * 6


def test_recent_tokens_stay_under_h2o() -> None:
    engine = tiny_engine()
    method = build(f"h2o:mode=drop:window=0:budget={BUDGET}", engine)
    list(engine.stream(method, Request(random_ids(PROMPT), 8)))
    recent = torch.arange(PROMPT + 7 - BUDGET // 2, PROMPT + 7)
    for cache in method.cache:
        assert torch.equal(cache.positions[-BUDGET // 2 :], recent.unsqueeze(1).expand(-1, 2))


def test_one_block_that_holds_the_rest_is_all_at_once() -> None:
    engine, kept = tiny_engine(), []
    for block in (0, PROMPT - BUDGET):
        method = build(f"keydiff:budget={BUDGET}:block={block}", engine)
        list(engine.stream(method, Request(random_ids(PROMPT), 1)))
        kept.append([cache.positions.tolist() for cache in method.cache])
    assert kept[0] == kept[1]


def test_criticalkv_keeps_the_best_half_of_its_base() -> None:
    engine, ids = tiny_engine(), random_ids(PROMPT)
    base, method = build(f"knorm:budget={BUDGET // 2}", engine), build(f"criticalkv:base=knorm:budget={BUDGET}", engine)
    for each in (base, method):
        list(engine.stream(each, Request(ids, 1)))
    for few, many in zip(base.cache, method.cache, strict=True):
        for head in range(2):
            assert set(few.positions[:, head].tolist()) < set(many.positions[:, head].tolist())


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "h2o", "tova", "knorm", "keydiff", "expected", "criticalkv"])
def test_a_prompt_no_longer_than_the_budget_is_not_pruned(name: str) -> None:
    engine = tiny_engine()
    method = build(f"{name}:budget={PROMPT}", engine)
    engine.read(method, Request(random_ids(PROMPT), 1))
    assert method.tokens_kept() == [PROMPT] * 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv:budget=31", "snapkv: budget=31 is less than window=32, which always stay"),
        ("pyramidkv:kernel=4", "pyramidkv: kernel=4 is even"),
        ("h2o:budget=7:window=8", "h2o: budget=7 is less than window=8"),
        ("expected:budget=3", "expected: budget=3 is less than sinks=4"),
        ("criticalkv:budget=20", "^criticalkv, by the defaults of its base snapkv: budget=20 is less than window=32"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_loads(text: str, message: str) -> None:
    (spec,) = parse_methods(text)
    with pytest.raises(InputError, match=message):
        spec.check(tiny_shape())


def test_expected_looks_no_further_ahead_than_a_context_reaches() -> None:
    parse_methods("expected:future=131072")
    with pytest.raises(InputError, match="expected: future: Input should be less than or equal to 131072"):
        parse_methods("expected:future=131073")


@pytest.mark.parametrize(
    "text",
    ["snapkv:window=8", "pyramidkv:window=8", "adakv:window=8", "adakv:window=8:normalize=true", "h2o:window=8",
     "h2o:window=8:mode=drop", "fastkv:window=8:keep=8"],
)  # fmt: skip
def test_a_budget_may_be_the_window_alone(text: str) -> None:
    engine = tiny_engine()
    method = build(f"{text}:budget=8", engine)
    engine.read(method, Request(random_ids(PROMPT), 1))
    first = method.cache[0].kept_positions()
    assert all(positions.tolist() == list(range(PROMPT - 8, PROMPT)) for positions in first)
    assert method.tokens_kept() == [8] * 6


def test_the_random_control_draws_anew_for_every_layer_and_head_and_the_same_for_the_same_seed() -> None:
    engine = tiny_engine()
    kept = []
    for seed in (0, 0, 1):
        method = build(f"randomkv:budget=16:seed={seed}", engine)
        list(engine.stream(method, Request(random_ids(PROMPT), 1)))
        kept.append([positions.tolist() for cache in method.cache for positions in cache.kept_positions()])
    assert kept[0] == kept[1] != kept[2]
    assert len({tuple(head) for head in kept[0]}) == len(kept[0])
