"""Models and methods spread over ranks: the same tokens, and the same choices, as in one place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from harness.engine.engine import Engine
from harness.engine.parallel import ALONE, Ranks
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.request import Request
from harness.engine.verbs import Verbs
from harness.models.division import part_of
from harness.runner import catalog
from tests.ranks import divided, on_ranks
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import build, random_ids, tiny_engine, tiny_model, tiny_shape

for name in ("rowwise", "gemv", "decode_attention", "row_attention", "token_scores", "revival", "eviction"):
    kernels(name)

PROMPT = random_ids(300)
NEW = 6
Answer = tuple[list[int], list[list[list[int]]]]
"""Tokens, and for each layer the positions that its heads hold."""

METHODS = (
    "full", "slim:layers=2/4:budgets=128/96:block=16", "slim:layers=2/4:budgets=0.5/0.3:block=16:score=token_peak:w=4",
    "slim:layers=2/4:budgets=128/96:block=16:score=softmax:ff=all", "lazyllm:layers=2/4:keep=0.5/0.2",
    "slim:layers=2/4:budgets=128/96:block=16:score=query_peak:votes=2",
    "lazyllm:layers=2/4:keep=0.5/0.2:revive=false", "random:layers=2/4:budgets=128/96:block=16", "randomkv:budget=64",
    "recent:layers=2/4:budgets=128/96:block=16", "truncate:layers=2/4:budgets=128/96:block=16",
    "quest:budget=64", "quest:budget=64:per=kv_head:page=8", "streaming:window=64", "streaming:mode=slide:window=64",
    "snapkv:budget=64", "pyramidkv:budget=64:window=8", "knorm:budget=64", "keydiff:budget=64", "tova:budget=64",
    "expected:budget=64", "criticalkv:budget=64", "h2o:budget=64", "h2o:budget=64:mode=drop",
    "fastkv:budget=48:keep=100:cut=2", "gemfilter:budget=100:layer=2", "adakv:budget=64",
    "adakv:budget=64:normalize=true", "kvzip:budget=64:chunk=100", "duo:sinks=4:recent=20:sparsity=0.6",
    "lychee:budget=64:retrieval=0.4", "ashape:sinks=4:window=64", "trishape:sinks=4:window=64:last=30",
    "minference:vertical=40:slash=100", "flexprefill:gamma=0.5:min_budget=128", "xattention:stride=8:tau=0.5",
    "slim:layers=2/4:budgets=128/96:block=16+xattention:tau=0.5",
)  # fmt: skip


REPLAYED = (
    "full", "slim:layers=1/2:budgets=48/32:block=16", "lazyllm:layers=1/2:keep=0.5/0.3", "adakv:budget=24:window=4",
    "quest:budget=32:page=8", "h2o:budget=32:mode=drop", "duo:sinks=3:recent=9",
)  # fmt: skip
"""With decode steps that are recorded."""


def answer(text: str, engine: Engine, prompt: torch.Tensor = PROMPT, new: int = NEW) -> Answer:
    method = build(text, engine)
    tokens = list(engine.stream(method, Request(prompt, new)))
    held = engine.context.ranks.every_head([cache.kept_positions() for cache in method.cache])
    return tokens, [[sorted(head.tolist()) for head in heads] for heads in held]


def spread(text: str, size: int, heads: str = "MHA") -> Sequence[Answer]:
    """Every rank's answer of a model over so many."""
    model, shape = tiny_model(heads=heads), tiny_shape(heads)
    return on_ranks(size, lambda ranks: answer(text, Engine(divided(model, ranks), shape, ranks=ranks)))


def test_whatever_says_that_it_is_for_several_ranks_is_shown_here() -> None:
    says = {name for name in catalog.METHODS.names() if vars(catalog.METHODS.get(name)).get("parallel")}
    assert {text.partition(":")[0] for text in METHODS} == says


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.slow
def test_a_method_answers_and_keeps_as_in_one_place(text: str) -> None:
    alone = answer(text, tiny_engine(heads="MHA"))
    assert list(spread(text, 2)) == [alone, alone]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("heads", "size"), [("MHA", 4), ("GQA", 2)])
def test_every_family_gives_the_logits_of_one_place(family: str, heads: str, size: int) -> None:
    model, shape = tiny_model(family, heads), tiny_shape(heads, family=family)

    def logits(ranks: Ranks) -> torch.Tensor:
        own = model if ranks is ALONE else divided(model, ranks)
        engine = Engine(own, shape, ranks=ranks)
        return engine.read(build("full", engine), Request(PROMPT, 1))[0]

    alone, found = logits(ALONE), on_ranks(size, logits)
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.allclose(found[0], alone, rtol=1e-4, atol=1e-4)


def graphed(text: str, fused: bool, ranks: Ranks = ALONE) -> Answer:
    """As a GPU does it; on a CPU its kernels are interpreted, few of them where products are stock."""
    model, shape = copy.deepcopy(tiny_model(heads="MHA", layers=3)), tiny_shape("MHA", layers=3)
    own = (model if ranks is ALONE else divided(model, ranks)).to(DEVICE)
    engine = Engine(own, shape, kind="graphed", ranks=ranks)
    if not fused:
        engine.verbs, engine.prefill = Verbs(own, ranks.part(shape), ranks), None
    # Products are interpreted row by row.
    length, new = (20, 3) if fused else (64, 4)
    return answer(text, engine, PROMPT[:length].to(DEVICE), new)


@pytest.mark.slow
@pytest.mark.parametrize("text", REPLAYED)
def test_recorded_steps_choose_alike(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What threads exchange cannot be recorded.
    monkeypatch.setattr(RecordedDecode, "_captured", lambda _, body, pool: body)
    work = partial(graphed, text, text == "full")
    alone = work()
    assert list(on_ranks(2, work)) == [alone, alone]


def test_a_bias_behind_a_sum_counts_once_and_other_parts_make_the_whole() -> None:
    weight, bias = torch.arange(24.0).view(4, 6), torch.arange(4.0)
    of_layer = "model.layers.0.self_attn.{}_proj.{}".format

    def parts(name: str, whole: torch.Tensor) -> Sequence[torch.Tensor]:
        return on_ranks(2, lambda ranks: part_of(name, whole, ranks))

    assert torch.equal(torch.cat(list(parts(of_layer("q", "weight"), weight))), weight)
    assert torch.equal(torch.cat(list(parts(of_layer("k", "bias"), bias))), bias)
    assert torch.equal(torch.cat(list(parts(of_layer("o", "weight"), weight)), 1), weight)
    assert torch.equal(torch.stack(list(parts(of_layer("o", "bias"), bias))).sum(0), bias)
    assert all(torch.equal(part, weight) for part in parts("model.embed_tokens.weight", weight))
