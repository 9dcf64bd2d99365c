"""Methods that keep few keys and values keep the same by kernels and without; interpreted where there is no GPU."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from harness.engine import cache as layer_cache
from harness.engine import step
from harness.engine.engine import Engine
from harness.engine.request import Request
from methods import keydiff
from methods.common import active_state, best, blocks, future, scores, take
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import build, random_ids, tiny_model, tiny_shape

for name in (
    "token_select", "take_tokens", "column_sums", "normal_queries", "unlike_keys", "rowwise",
    "query_peaks", "block_select", "take_rows", "active_set",
):  # fmt: skip
    kernels(name)

LAYERS, PROMPT, BUDGET = 2, 80, 30
METHODS = (
    "snapkv:window=8", "pyramidkv:window=8", "adakv:window=8", "h2o:window=8", "h2o:window=8:mode=drop", "tova",
    "knorm", "expected", "keydiff:block=16", "keydiff:block=0", "criticalkv", "criticalkv:base=expected",
)  # fmt: skip


@cache
def engine() -> Engine:
    return Engine(copy.deepcopy(tiny_model(layers=LAYERS)).to(DEVICE), tiny_shape(layers=LAYERS))


def kept(text: str, ids: Tensor) -> list[list[int]]:
    """Positions that each KV head of each layer holds behind the prompt and two tokens."""
    method = build(f"{text}:budget={BUDGET if 'critical' not in text else 50}", engine())
    list(engine().stream(method, Request(ids, 3)))
    return [positions.tolist() for cache in method.cache for positions in cache.kept_positions()]


def switch(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    for module in (active_state, best, blocks, layer_cache, scores, future, keydiff, step, take):
        for door in {"kernels_run", "kernels_take"} & vars(module).keys():
            monkeypatch.setattr(module, door, lambda _: on)


@pytest.mark.parametrize("text", METHODS)
def test_kernels_keep_what_plain_formulas_keep(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(PROMPT).to(DEVICE)
    switch(monkeypatch, False)
    expected = kept(text, ids)
    switch(monkeypatch, True)
    assert kept(text, ids) == expected


SCHEDULE = "layers=1/2:{}=40/24"


@pytest.mark.parametrize(
    "text",
    [
        f"slim:{SCHEDULE.format('budgets')}:block=8:unit=4:w=12:gamma=1",
        f"slim:{SCHEDULE.format('budgets')}:block=8:unit=4:w=12:gamma=1:votes=2:ff=all",
        f"lazyllm:{SCHEDULE.format('keep')}",
        f"lazyllm:{SCHEDULE.format('keep')}:revive=false",
    ],
)
def test_kernels_drop_the_rows_that_plain_formulas_drop(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on, ids, found = Engine(copy.deepcopy(tiny_model(layers=4)).to(DEVICE), tiny_shape(layers=4)), random_ids(75), []
    for kernel in (False, True):
        switch(monkeypatch, kernel)
        method = build(text, on)
        tokens = list(on.stream(method, Request(ids.to(DEVICE), 5)))
        found.append((tokens, [cache.token_positions.tolist() for cache in method.cache], method.notes()))
    assert found[0] == found[1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (12, 12), (28, 4)])
def test_half_precision_scores_are_those_of_float32(heads: int, kv_heads: int) -> None:
    n, d = 3001, 128
    shapes = (n, heads, d), (n, kv_heads, d), (n, kv_heads, d), (500, heads * d), (n, d)
    inputs = [torch.randn(shape).to("cuda", torch.bfloat16) for shape in shapes]
    for low, high in zip(readings(*inputs), readings(*(x.float() for x in inputs)), strict=True):
        torch.testing.assert_close(low, high, rtol=2e-2, atol=2e-2 * float(high.abs().mean()))


def readings(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, back: Tensor) -> list[Tensor]:
    """All scores; in float32 no kernel takes part."""
    mean, covariance = future.future_queries(q, future.Turns(back / 16, back[0].float() / 16))
    return [
        scores.window_attention(q[-32:], k), scores.attention_sums(q, k), scores.output_norms(v, [weight]),
        mean, covariance, future.expected_logits(k, mean, covariance),
    ]  # fmt: skip
