"""Every pruning method equals its slow twin, through the engine, on tiny random models of every family."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.step import Step
from tests.reference.controls import GivenTwin, RecentTwin, truncated
from tests.reference.lazyllm import LazyOptions, LazyTwin
from tests.reference.model import Trace, Twin
from tests.reference.quest import QuestOptions, QuestTwin
from tests.reference.slim import SlimOptions, SlimTwin
from tests.reference.streaming import StreamingOptions, StreamingTwin
from tests.tiny import FAMILIES, HEADS, LAYERS, build, random_ids, tiny_engine, tiny_model

Options = Mapping[str, Any]
Model = tuple[str, str]

MODELS: list[Model] = [(family, heads) for family in FAMILIES for heads in HEADS]
LENGTHS = [1, 5, 63, 64, 65, 128, 200, 333]
STEPS = 4

SLIM: list[Options] = [
    {},
    {"reselect": "A"},
    {"budgets": (200, 150, 130)},
    {"block": 16, "unit": 4, "reselect": "A"},
    {"block": 16, "unit": 4, "gamma": 1.0},
    {"block": 16, "unit": 4, "ff": "all", "w": 4},
    {"block": 16, "unit": 8, "score": "softmax", "w": 4},
    {"block": 16, "unit": 8, "score": "absdot", "w": 1},
    {"block": 8, "unit": 2, "budgets": (0.3, 0.2), "layers": (1, 2), "sink": 2, "tail": 2},
    {"block": 8, "unit": 8, "budgets": (0.5,), "layers": (5,), "sink": 0, "gamma": 0.5},
    {"block": 8, "unit": 4, "budgets": (0.4, 0.8, 17), "layers": (1, 3, 4), "score": "softmax"},
    {"block": 16, "unit": 4, "votes": 3, "score": "token_softmax"},
    {"block": 8, "unit": 4, "budgets": (0.6, 0.3), "layers": (2, 5), "votes": 9, "ff": "all"},
    {"block": 4, "unit": 1, "budgets": (0.07,), "layers": (3,), "w": 100, "gamma": 1.0},
    {"block": 1, "unit": 1, "budgets": (0.6, 0.3, 0.1), "layers": (1, 3, 5)},
]
LAZY: list[Options] = [
    {},
    {"revive": False},
    {"keep": (0.7, 0.49, 0.343), "layers": (2, 3, 4)},
    {"keep": (0.5, 0.5, 0.5), "layers": (1, 2, 5), "of": "survivors"},
    {"keep": (0.5, 0.5), "layers": (2, 4), "of": "survivors", "revive": False},
    {"keep": (40, 20), "layers": (1, 4)},
    {"keep": (0.3, 0.9), "layers": (2, 5)},
    {"keep": (0.01,), "layers": (3,)},
]
BANDS: list[Options] = [{"window": 60}, {"sinks": 0, "window": 7}, {"sinks": 9, "window": 0.3}, {"window": 1.0}]
STREAMING: list[Options] = [{"mode": mode, **band} for mode in ("faithful", "evict", "slide") for band in BANDS]
QUEST: list[Options] = [
    {"budget": 64},
    {"budget": 0.25},
    {"budget": 0.25, "per": "kv_head"},
    {"budget": 20, "page": 4, "dense_layers": 0, "per": "kv_head"},
    {"budget": 0.5, "page": 7, "dense_layers": 1},
    {"budget": 10, "page": 16, "dense_layers": 0},
    {"budget": 20, "page": 4, "dense_layers": 1, "offload": "host"},
]
RECENT: list[Options] = [
    {"block": 16, "unit": 4, "reselect": "A"},
    {"block": 8, "unit": 8, "budgets": (0.3, 0.2), "layers": (1, 2), "sink": 2, "tail": 2, "reselect": "A"},
]


def text(name: str, options: Options) -> str:
    """The method as the command line names it."""
    values = {key: "/".join(map(str, value)) if isinstance(value, tuple) else value for key, value in options.items()}
    return ":".join([name, *(f"{key}={value}" for key, value in values.items())])


def method_named(name: str, options: Options, model: Model) -> Method:
    return build(text(name, options), tiny_engine(*model))


def rotating(options: list[Options]) -> list[Any]:
    """Every set of options at every other length; where they begin and the models take turns."""
    starts = [(turn + turn // len(BANDS)) % 2 for turn in range(len(options))]
    pairs = [(given, length) for given, start in zip(options, starts, strict=True) for length in LENGTHS[start::2]]
    return [
        pytest.param(given_options, length, MODELS[index % len(MODELS)], id=f"{text('', given_options)}-{length}")
        for index, (given_options, length) in enumerate(pairs)
    ]


def held(method: Method) -> list[set[int]]:
    """Positions in every layer's cache, each once."""
    layers = [cache.token_positions.tolist() for cache in method.cache]
    assert all(len(layer) == len(set(layer)) for layer in layers)
    return [set(layer) for layer in layers]


def run(method: Method, ids: Tensor, prompt_len: int, model: Model) -> Trace:
    """What the method did to the prompt and, one by one, to the rest of `ids`."""
    engine, trace = tiny_engine(*model), Trace()
    method.begin(prompt_len, len(ids) - prompt_len)
    trace.logits.append(engine.forward(method, ids[:prompt_len], Step("prefill", 0, prompt_len)))
    trace.held.append(held(method))
    for position in range(prompt_len, len(ids)):
        trace.logits.append(engine.forward(method, ids[position : position + 1], Step("decode", position, 1)))
        trace.held.append(held(method))
    return trace


def same_steps(twin: Twin, method: Method, ids: Tensor, model: Model) -> None:
    """Of every step the logits, and the tokens that are held, are the twin's."""
    real, expected = run(method, ids, twin.prompt_len, model), twin.run(ids)
    same_logits(real, expected)
    assert real.held == expected.held


def same_logits(real: Trace, twin: Trace) -> None:
    for step, (ours, theirs) in enumerate(zip(real.logits, twin.logits, strict=True)):
        off = float((ours - theirs).abs().max())
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), f"step {step}: logits are off by up to {off}"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("length", [1, 65])
def test_full(length: int, model: Model) -> None:
    ids = random_ids(length + STEPS)
    same_steps(Twin(tiny_model(*model), length, len(ids)), method_named("full", {}, model), ids, model)


@pytest.mark.parametrize(("options", "length", "model"), rotating(SLIM))
def test_slim(options: Options, length: int, model: Model) -> None:
    method, ids = method_named("slim", options, model), random_ids(length + STEPS)
    same_steps(SlimTwin(tiny_model(*model), length, len(ids), SlimOptions(**options)), method, ids, model)


@pytest.mark.parametrize(("gamma", "swaps"), [(0.0, 0), (1.0, 3 * STEPS)])
def test_slim_changes_its_active_sets_below_gamma(gamma: float, swaps: int) -> None:
    options: Options = {"block": 8, "unit": 4, "gamma": gamma}
    ids = random_ids(200 + STEPS)
    twin = SlimTwin(tiny_model(), 200, len(ids), SlimOptions(**options))
    same_logits(run(method_named("slim", options, MODELS[0]), ids, 200, MODELS[0]), twin.run(ids))
    assert twin.swaps == swaps


@pytest.mark.parametrize("depth", [4, 8, 24])
def test_slim_scales_its_layers_with_the_depth(depth: int) -> None:
    ids, engine = random_ids(100), tiny_engine(layers=depth)
    method = build("slim:block=8", engine)
    method.begin(100, 0)
    engine.forward(method, ids, Step("prefill", 0, 100))
    assert held(method) == SlimTwin(tiny_model(layers=depth), 100, 100, SlimOptions(block=8)).run(ids).held[0]


@pytest.mark.parametrize(("options", "length", "model"), rotating(LAZY))
def test_lazyllm(options: Options, length: int, model: Model) -> None:
    method, ids = method_named("lazyllm", options, model), random_ids(length + STEPS)
    twin = LazyTwin(tiny_model(*model), length, len(ids), LazyOptions(**options))
    same_steps(twin, method, ids, model)
    assert method.tokens_recomputed() == twin.revived


@st.composite
def lazy_options(draw: st.DrawFn) -> Options:
    layers = sorted(draw(st.sets(st.integers(1, LAYERS - 1), min_size=1, max_size=4)))
    budget = st.one_of(st.floats(0.05, 1.0).map(lambda share: round(share, 2)), st.integers(2, 60))
    keep = draw(st.lists(budget, min_size=len(layers), max_size=len(layers)))
    return {"keep": tuple(keep), "layers": tuple(layers), "of": draw(st.sampled_from(["prompt", "survivors"]))}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lazy_options(), st.integers(1, 70), st.integers(0, 8), st.integers(0, 99))
def test_lazyllm_has_every_token_in_cache_or_in_one_aux(options: Options, length: int, steps: int, seed: int) -> None:
    method, ids = method_named("lazyllm", options, MODELS[0]), random_ids(length + steps, seed)
    method.begin(length, steps)
    tiny_engine().forward(method, ids[:length], Step("prefill", 0, length))
    assert_all_there(method, options["layers"], length)
    for position in range(length, length + steps):
        tiny_engine().forward(method, ids[position : position + 1], Step("decode", position, 1))
        assert_all_there(method, options["layers"], position + 1)


def assert_all_there(method: Any, layers: tuple[int, ...], seen: int) -> None:
    """A token that a pruned layer lacks waits in front of exactly one layer up to it; no token is anywhere twice."""
    cached = held(method)
    waiting = [(layer, position) for layer in layers for position in method.aux[layer].positions.tolist()]
    assert len(waiting) == len(set(waiting))
    for layer in layers:
        for token in range(seen):
            places = sum(position == token and before <= layer for before, position in waiting)
            assert places == (token not in cached[layer]), f"layer {layer}, token {token}: in {places} aux caches"


@pytest.mark.parametrize(("options", "length", "model"), rotating(STREAMING))
@pytest.mark.slow
def test_streaming(options: Options, length: int, model: Model) -> None:
    method, ids = method_named("streaming", options, model), random_ids(length + STEPS)
    same_steps(StreamingTwin(tiny_model(*model), length, len(ids), StreamingOptions(**options)), method, ids, model)


@pytest.mark.parametrize("options", STREAMING)
@pytest.mark.parametrize("length", [3, 30, 150])
@pytest.mark.slow
def test_streaming_takes_a_question_in_one_step(options: Options, length: int) -> None:
    method, ids, late = method_named("streaming", options, MODELS[0]), random_ids(length + 12), 9
    twin = StreamingTwin(tiny_model(), length, len(ids), StreamingOptions(**options))
    method.begin(length, len(ids) - length)
    borders = [0, length, length + late, *range(length + late + 1, len(ids) + 1)]
    for start, end in pairwise(borders):
        step = Step("decode" if start else "prefill", start, end - start)
        ours = tiny_engine().forward(method, ids[start:end], step)
        twin.step(torch.arange(start, end), ids[start:end])
        assert torch.allclose(ours, twin.trace.logits[-1], atol=1e-4, rtol=1e-4)
        assert held(method) == twin.trace.held[-1]


def test_streaming_evicts_nothing_while_a_question_comes_in() -> None:
    method, ids = method_named("streaming", {"mode": "evict", "sinks": 4, "window": 30}, MODELS[0]), random_ids(100)
    list(tiny_engine().stream(method, Request(ids, 6, question=20, question_after=True)))
    stays = {*range(4), *range(50, 80), *range(80, 105)}
    assert held(method) == [stays] * LAYERS


@pytest.mark.parametrize(("options", "length", "model"), rotating(QUEST))
@pytest.mark.slow
def test_quest(options: Options, length: int, model: Model) -> None:
    method, ids = method_named("quest", options, model), random_ids(length + STEPS)
    same_steps(QuestTwin(tiny_model(*model), length, len(ids), QuestOptions(**options)), method, ids, model)


@pytest.mark.parametrize(("options", "length", "model"), rotating(RECENT))
def test_recent(options: Options, length: int, model: Model) -> None:
    method, ids = method_named("recent", options, model), random_ids(length + STEPS)
    same_steps(RecentTwin(tiny_model(*model), length, len(ids), SlimOptions(**options)), method, ids, model)


@pytest.mark.parametrize(("options", "length", "model"), rotating(RECENT))
def test_random_keeps_as_many_blocks_as_slim(options: Options, length: int, model: Model) -> None:
    method, ids = method_named("random", options, model), random_ids(length + STEPS)
    slim = SlimTwin(tiny_model(*model), length, len(ids), SlimOptions(**options)).run(ids)
    real = run(method, ids, length, model)
    assert [len(layer) for layer in real.held[0]] == [len(layer) for layer in slim.held[0]]
    same_logits(real, GivenTwin(tiny_model(*model), length, len(ids), real.held[0]).run(ids))


@pytest.mark.parametrize(("options", "length", "model"), rotating([{}, *RECENT]))
def test_truncate(options: Options, length: int, model: Model) -> None:
    method, ids = method_named("truncate", options, model), random_ids(length + STEPS)
    prompt = truncated(ids[:length], method.model.shape.layers, SlimOptions(**options))
    assert method.prompt(ids[:length], tiny_engine(*model).first_layers).tolist() == prompt.tolist()
    cut = torch.cat((prompt, ids[length:]))
    same_logits(run(method, cut, len(prompt), model), Twin(tiny_model(*model), len(prompt), len(cut)).run(cut))
