"""Methods that keep fewer keys and values keep, in every layer and KV head, what their slow twins keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.method import Method
from harness.engine.step import Step
from tests.methods.test_references import Model, Options, method_named, same_logits, text
from tests.reference.eviction import (
    AdaOptions,
    AdaTwin,
    BudgetOptions,
    CriticalTwin,
    EvictionTwin,
    ExpectedOptions,
    ExpectedTwin,
    H2ODropTwin,
    H2OOptions,
    H2OTwin,
    KeyDiffOptions,
    KeyDiffTwin,
    KnormTwin,
    PyramidOptions,
    PyramidTwin,
    SnapOptions,
    SnapTwin,
    TovaTwin,
)
from tests.reference.model import Trace
from tests.tiny import END, FAMILIES, HEADS, tiny_engine, tiny_model

LENGTHS = [17, 64, 90, 180]
STEPS = 4

TWINS: dict[str, tuple[Callable[..., EvictionTwin], Callable[..., BudgetOptions]]] = {
    "snapkv": (SnapTwin, SnapOptions),
    "pyramidkv": (PyramidTwin, PyramidOptions),
    "adakv": (AdaTwin, AdaOptions),
    "h2o": (H2OTwin, H2OOptions),
    "h2o:drop": (H2ODropTwin, H2OOptions),
    "tova": (TovaTwin, BudgetOptions),
    "expected": (ExpectedTwin, ExpectedOptions),
    "keydiff": (KeyDiffTwin, KeyDiffOptions),
    "knorm": (KnormTwin, BudgetOptions),
}
CASES: dict[str, list[Options]] = {
    "snapkv": [
        {"budget": 64},
        {"budget": 0.25},
        {"budget": 63, "window": 8, "pool": "max"},
        {"budget": 0.25, "window": 4, "kernel": 7, "pool": "max"},
        {"budget": 0.9, "window": 1, "kernel": 1},
        {"budget": 17, "window": 16, "kernel": 3},
        {"budget": 18, "window": 17, "kernel": 9, "pool": "max"},
        {"budget": 17, "window": 17},
    ],
    "pyramidkv": [
        {"budget": 40, "window": 8, "kernel": 5, "pool": "max"},
        {"budget": 40, "window": 7, "kernel": 5, "pool": "avg"},
        {"budget": 63, "window": 8, "kernel": 7, "pool": "max", "beta": 2},
        {"budget": 0.25, "window": 4, "kernel": 3, "pool": "avg", "beta": 5},
        {"budget": 0.5, "window": 1, "kernel": 1, "beta": 1},
        {"budget": 0.25},
    ],
    "adakv": [
        {"budget": 48},
        {"budget": 0.25},
        {"budget": 63, "window": 8, "kernel": 5},
        {"budget": 0.25, "window": 4, "kernel": 3, "pool": "avg", "alpha": 0.5},
        {"budget": 0.5, "window": 1, "kernel": 1, "alpha": 0.0},
        {"budget": 0.4, "window": 3, "alpha": 1.0},
    ],
    "h2o": [
        {"budget": 64, "window": 8},
        {"budget": 0.25, "window": 4},
        {"budget": 20, "window": 19},
        {"budget": 19, "window": 19},
        {"budget": 19, "window": 19, "mode": "drop"},
        {"budget": 33, "window": 0},
        {"budget": 33, "window": 0, "mode": "drop"},
        {"budget": 66, "window": 5, "mode": "drop"},
        {"budget": 0.25, "window": 0, "mode": "drop"},
        {"budget": 0.25, "mode": "drop"},
        {"budget": 1.0, "mode": "drop"},
    ],
    "tova": [{"budget": 64}, {"budget": 66}, {"budget": 0.25}, {"budget": 2}, {"budget": 1.0}],
    "expected": [
        {"budget": 64},
        {"budget": 0.3},
        {"budget": 0.25, "sinks": 0, "future": 1},
        {"budget": 0.25, "sinks": 9},
    ],
    "keydiff": [{"budget": 40}, {"budget": 0.25, "block": 16}, {"budget": 0.5, "block": 0}, {"budget": 9, "block": 5}],
    "knorm": [{"budget": 63}, {"budget": 0.25}, {"budget": 0.9}],
    "criticalkv": [
        {"budget": 64, "base": "snapkv"},
        {"budget": 0.4, "base": "expected"},
        {"budget": 0.25, "base": "knorm"},
        {"budget": 41, "base": "expected"},
    ],
}


def rotating() -> list[Any]:
    """Every set of options at every length, one of which is quick; over the lengths, it meets every family."""
    sets = [(name, options) for name, each in CASES.items() for options in each]
    places = [(which, nth) for which in range(len(sets)) for nth in range(len(LENGTHS))]
    heads = list(HEADS)
    return [
        pytest.param(
            *sets[which],
            LENGTHS[nth],
            (FAMILIES[(which + nth) % len(FAMILIES)], heads[index % len(heads)]),
            id=f"{text(*sets[which])}-{LENGTHS[nth]}",
            marks=[] if nth == which % len(LENGTHS) else pytest.mark.slow,
        )
        for index, (which, nth) in enumerate(places)
    ]


def twin_named(name: str, options: Options, *request: Any) -> EvictionTwin:
    """The twin for a request, which is a model and the tokens of its prompt and in all."""
    if name == "criticalkv":
        return critical(*request, **options)
    twin, known = TWINS[f"{name}:drop" if options.get("mode") == "drop" else name]
    return twin(*request, known(**options))


def critical(*request: Any, budget: int | float, base: str) -> CriticalTwin:
    without: Options = {"vnorm": False} if base == "expected" else {}  # values are to count once
    kind: Any = CriticalTwin
    twin: CriticalTwin = kind(twin_named(base, {"budget": budget, **without}, *request), *request)
    return twin


def run(method: Method, ids: Tensor, prompt_len: int, model: Model) -> Trace:
    """What the method did to the prompt and, one by one, to the rest of `ids`."""
    engine, trace = tiny_engine(*model), Trace()
    method.begin(prompt_len, len(ids) - prompt_len)
    steps = [Step("prefill", 0, prompt_len), *(Step("decode", position, 1) for position in range(prompt_len, len(ids)))]
    for step in steps:
        trace.logits.append(engine.forward(method, ids[step.start : step.start + step.count], step))
        trace.heads.append(held(method, method.model.shape.kv_heads))
    return trace


def held(method: Method, kv_heads: int) -> list[list[set[int]]]:
    """Positions that every layer and KV head holds, each once."""
    layers = []
    for cache in method.cache:
        heads = [positions.tolist() for positions in cache.kept_positions()]
        assert all(len(head) == len(set(head)) for head in heads)
        assert len(heads) in (1, kv_heads)
        layers.append([set(head) for head in heads] * (kv_heads // len(heads)))
    return layers


def distinct_ids(length: int) -> Tensor:
    """[length]: none twice, because the first layer's keys of the same token are equally long but for rounding."""
    return torch.randperm(END, generator=torch.Generator().manual_seed(0))[:length]


def differences(real: Trace, twin: Trace) -> list[str]:
    """Where and how kept sets differ."""
    return [
        f"step {step}, layer {layer}, KV head {head}: only kept here {sorted(ours - theirs)}, only by the twin "
        f"{sorted(theirs - ours)}"
        for step, layers in enumerate(zip(real.heads, twin.heads, strict=True))
        for layer, heads in enumerate(zip(*layers, strict=True))
        for head, (ours, theirs) in enumerate(zip(*heads, strict=True))
        if ours != theirs
    ]


@pytest.mark.parametrize(("name", "options", "length", "model"), rotating())
def test_it_keeps_what_its_twin_keeps(name: str, options: Options, length: int, model: Model) -> None:
    method, ids = method_named(name, options, model), distinct_ids(length + STEPS)
    real, twin = run(method, ids, length, model), twin_named(name, options, tiny_model(*model), length, len(ids))
    twin.run(ids)
    assert differences(real, twin.trace)[:3] == []
    same_logits(real, twin.trace)
    kept = [sum(len(head & set(range(length))) for head in layer) / len(layer) for layer in twin.trace.heads[-1]]
    assert list(method.tokens_kept()) == pytest.approx(kept)
