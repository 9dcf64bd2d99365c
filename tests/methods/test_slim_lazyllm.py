"""Pruning during the prefill: what goes, what stays, and that nothing to prune is full attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.engine.method import Method
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.runner.catalog import parse_methods
from methods.slim import Slim
from tests.tiny import FAMILIES, HEADS, build, generate, random_ids, tiny_engine, tiny_shape

NOTHING_TO_PRUNE = [
    "slim:budgets=1.0/1.0/1.0",
    "slim:budgets=4096/2048/1024",
    "lazyllm:keep=1/1/1",
    "lazyllm:keep=4000/4000/4000",
]
PRUNING = [
    "slim",
    "slim:score=softmax",
    "slim:score=absdot:w=4",
    "slim:ff=all:block=16:unit=4:sink=2:tail=2",
    "slim:budgets=128/64:layers=2/4:block=16",
    "lazyllm",
    "lazyllm:keep=0.5/20:layers=1/5",
]


@pytest.mark.parametrize("text", NOTHING_TO_PRUNE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.slow
def test_nothing_to_prune_is_full_attention(text: str, family: str, heads: str) -> None:
    engine, ids = tiny_engine(family, heads), random_ids(333)
    assert generate(text, engine, ids) == generate("full", engine, ids)


@pytest.mark.parametrize("text", PRUNING)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 333, 640])
def test_kept_tokens_are_within_budget_nested_and_end_with_the_prompt(text: str, length: int) -> None:
    engine = tiny_engine()
    method = build(text, engine)
    method.begin(length, 4)
    engine.forward(method, random_ids(length), Step("prefill", 0, length))
    kept, asked = method.tokens_kept(), method.tokens_requested()
    assert kept[0] == length
    assert all(0 < have <= may for have, may in zip(kept, asked, strict=True))
    for cache, below in zip(method.cache[1:], method.cache, strict=False):
        positions = cache.token_positions.tolist()
        assert positions == sorted(set(positions)) and set(positions) <= set(below.token_positions.tolist())
        assert positions[-1] == length - 1


def test_slim_keeps_sink_and_tail_and_whole_blocks() -> None:
    engine = tiny_engine()
    method = build("slim:budgets=0.5:layers=3:block=16:unit=4", engine)
    method.begin(200, 1)
    engine.forward(method, random_ids(200), Step("prefill", 0, 200))
    sizes = Counter((method.cache[3].token_positions // 16).tolist())
    assert 0 in sizes and sizes.pop(12) == 8 and set(sizes.values()) == {16}
    assert len(method.cache[3].token_positions) == 88  # five blocks of 16 and the last one of 8 fit into 100


def test_dropped_rows_skip_the_feed_forward_of_the_layer_before() -> None:
    engine, rows = tiny_engine(), []
    handle = engine.layers[2].mlp.register_forward_hook(lambda _m, x, _y: rows.append(x[0].shape[0]))
    try:
        for ff in ("survivors", "all"):
            generate(f"slim:budgets=64:layers=3:block=16:ff={ff}", engine, random_ids(256), 1)
    finally:
        handle.remove()
    assert rows == [64, 256]


def test_lazyllm_keeps_the_tokens_that_the_last_token_attends_to() -> None:
    engine, ids = tiny_engine(), random_ids(40)
    method = build("lazyllm:keep=0.25:layers=2", engine)
    method.begin(40, 1)
    engine.forward(method, ids, Step("prefill", 0, 40))
    full = build("full", engine)
    full.begin(40, 1)
    queries: list[torch.Tensor] = []

    def spy(layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        queries.append(heads.q)
        return rows

    full.after_layer = spy  # type: ignore[method-assign]
    engine.forward(full, ids, Step("prefill", 0, 40))
    q, k = queries[1][-1], full.cache[1].keys.repeat_interleave(2, dim=1)
    attention = torch.stack([(k[:, head] @ q[head] / 4).softmax(0) for head in range(4)]).mean(0)
    best = set(attention[:-1].topk(9).indices.tolist()) | {39}
    assert set(method.cache[2].token_positions.tolist()) == best


def decoding(text: str, length: int, steps: int) -> tuple[Method, Callable[[], None]]:
    """A method behind the prefill of a random prompt, and what runs its next `steps` decode steps."""
    engine, ids = tiny_engine(), random_ids(length + steps)
    method = build(text, engine)
    method.begin(length, steps)
    engine.forward(method, ids[:length], Step("prefill", 0, length))

    def decode() -> None:
        for position in range(length, length + steps):
            engine.forward(method, ids[position : position + 1], Step("decode", position, 1))

    return method, decode


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators for which the host would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(at is not None and at.dtype == torch.bool for at in args[1])
        self.count += by_mask or name in ("_local_scalar_dense", "item", "nonzero", "_unique2", "equal")
        return func(*args, **kwargs or {})


def test_lazyllm_waits_for_the_device_once_a_pruning_point() -> None:
    method, decode = decoding("lazyllm:keep=0.5/0.25/0.125:layers=1/3/5", 200, 6)
    with Waits() as waits:  # type: ignore[no-untyped-call]
        decode()
    assert waits.count == 6 * 3
    assert method.tokens_recomputed() > 100  # with rows that come back, and are dropped again


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slim:budgets=0.5/0.25", "2 budgets for 3 pruning layers"),
        ("slim:layers=1/2/6", "must lie in 1..5"),
        ("slim:layers=0/2/3", "must lie in 1..5"),
        ("slim:layers=3/2/4", "must ascend"),
        ("slim:budgets=64/64/64", "keeps nothing"),
        ("slim:unit=7", "multiple of unit"),
        ("truncate:layers=3", "truncate: 3 budgets for 1 pruning layers"),
        ("random:layers=3", "random: 3 budgets for 1 pruning layers"),
        ("lazyllm:layers=4", "3 budgets for 1"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(text: str, words: str) -> None:
    (spec,) = parse_methods(text)
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        spec.check(tiny_shape())


@pytest.mark.parametrize("text", ["slim", "lazyllm", "random", "truncate"])
def test_a_model_too_shallow_for_the_default_schedule_is_refused_and_layers_can_be_named(text: str) -> None:
    for depth in (1, 2, 3):
        with pytest.raises(InputError, match=rf"too shallow \({depth} layers\) for the default schedule; name layers"):
            parse_methods(text)[0].check(tiny_shape(layers=depth))
    parse_methods(text)[0].check(tiny_shape(layers=4))
    keep = "keep" if text == "lazyllm" else "budgets"
    parse_methods(f"{text}:{keep}=0.5:layers=1")[0].check(tiny_shape(layers=2))


@pytest.mark.parametrize(
    "text", ["lazyllm:keep=1e-9/1e-9/1e-9", "lazyllm:keep=1e-9/1e-9/1e-9:of=survivors", "slim:budgets=1e-9/1e-9/1e-9",
             "lazyllm:keep=1e-9/1e-9/1e-9:revive=false", "streaming:window=1e-9:sinks=0", "quest:budget=1e-9"],
)  # fmt: skip
def test_a_share_that_rounds_to_nothing_keeps_a_token(text: str) -> None:
    engine = tiny_engine()
    method = build(text, engine)
    generate(text, engine, random_ids(200))
    method.begin(200, 4)
    assert min(method.tokens_requested()) >= 1
    engine.forward(method, random_ids(200), Step("prefill", 0, 200))
    assert min(method.tokens_kept()) >= 1


@pytest.mark.parametrize("text", ["slmi", "slim:budget=0.5", "slim/x", "slim:score=best", "slim:w=0"])
def test_unknown_names_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_methods(text)


@pytest.mark.parametrize("score", ["token_softmax", "token_peak", "query_peak", "softmax", "absdot"])
def test_only_queries_of_the_prompts_last_w_rate_blocks(score: str) -> None:
    (spec,) = parse_methods(f"slim:score={score}:block=16:unit=4:w=8")
    method, generator = spec.build(tiny_engine().context), torch.Generator().manual_seed(3)
    assert isinstance(method, Slim)
    method.begin(100, 0)
    # The last block holds two tokens; the one before it is gone, so six of the last eight rows are not the last tokens.
    positions = torch.cat((torch.arange(32), torch.tensor([98, 99])))
    q, k = (torch.randn(34, heads, 16, generator=generator) for heads in (4, 2))
    scores = method.unit_scores(Heads(q, k, k, positions))
    q[:-2] = torch.randn(32, 4, 16, generator=generator)
    assert torch.equal(method.unit_scores(Heads(q, k, k, positions)), scores)
    q[-2] = torch.randn(4, 16, generator=generator)
    assert not torch.equal(method.unit_scores(Heads(q, k, k, positions)), scores)


def test_token_peak_is_what_the_keenest_head_pays_a_unit() -> None:
    w, heads, kv_heads, n, d, unit = 3, 4, 2, 21, 8, 4
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(w, heads, d, generator=generator), torch.randn(n, kv_heads, d, generator=generator)
    (spec,) = parse_methods(f"slim:score=token_peak:block=8:unit=4:w={w}")
    method = spec.build(tiny_engine().context)
    assert isinstance(method, Slim)
    best = [0.0] * 6
    for head in range(heads):
        paid = torch.zeros(n)
        for row in range(w):
            seen = n - w + row + 1
            paid[:seen] += torch.softmax(k[:seen, head // 2] @ q[row, head] / d**0.5, 0) / w
        best = [max(old, float(paid[i * unit : i * unit + unit].sum())) for i, old in enumerate(best)]
    expected = torch.tensor(best)
    method.begin(n, 0)
    everything = torch.arange(n)
    queries = torch.cat((torch.zeros(n - w, heads, d), q))
    assert torch.allclose(method.unit_scores(Heads(queries, k, k, everything)), expected, atol=1e-6)
