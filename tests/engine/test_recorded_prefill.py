"""Recorded prefills against layers that are launched one by one; without a GPU the recorded body runs as it is."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.conformance.tiny import tiny_model, tiny_shape
from harness.engine.engine import Engine
from harness.engine.generation import Work
from harness.engine.method import Method, acting_layers
from harness.engine.replay.recorded_prefill import padded
from harness.engine.request import Request
from harness.engine.step import Heads, Step
from harness.runner.catalog import parse_methods
from methods.full import Full
from methods.slim import Slim
from tests.reference.interpreter import DEVICE, kernels

kernels("store_rows")
for name in ("rowwise", "gemv", "decode_attention"):
    kernels(name)

LAYERS = 6
PROMPT = torch.randint(0, 60, (200,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
SCHEDULE = "layers=2/4:budgets=0.75/0.5:block=16"


def engines() -> tuple[Engine, Engine]:
    """Stock, and one that records prefills, with the stock verbs: interpreted products would take most time."""
    model, shape = tiny_model("llama", layers=LAYERS), tiny_shape(layers=LAYERS)
    stock, recorded = (copy.deepcopy(model).to(DEVICE) for _ in range(2))
    plain, graphed = Engine(stock, shape), Engine(recorded, shape, kind="graphed")
    assert graphed.prefill is not None
    graphed.prefill._verbs = graphed.verbs = plain.verbs
    return plain, graphed


def build(text: str, engine: Engine) -> Method:
    (spec,) = parse_methods(text)
    return spec.build(engine.context)


@pytest.mark.parametrize(
    "text",
    ["full", f"slim:{SCHEDULE}", f"slim:{SCHEDULE}:ff=all", f"random:{SCHEDULE}", "lazyllm:layers=2/4:keep=0.75/0.5",
     "lazyllm:layers=2/4:keep=0.75/0.5:revive=false", "snapkv:budget=0.5:window=8"],
)  # fmt: skip
def test_prefills_are_the_same_recorded_or_not(text: str) -> None:
    plain, graphed = engines()
    expected, method = build(text, plain), build(text, graphed)
    # A longer prompt leaves its rows behind, where the shorter one's padding lies.
    for length in (200, 130, 200):
        a, b = Work(), Work()
        with torch.inference_mode():
            theirs, _ = plain.read(expected, Request(PROMPT[:length], 3), a)
            ours, _ = graphed.read(method, Request(PROMPT[:length], 3), b)
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert a == b
        for mine, other in zip(method.cache, expected.cache, strict=True):
            assert torch.equal(mine.positions, other.positions)
            assert torch.allclose(mine.keys, other.keys, atol=1e-5)
            assert torch.allclose(mine.values, other.values, atol=1e-5)


def test_what_is_recorded_is_what_the_method_leaves_alone() -> None:
    _, graphed = engines()
    assert graphed.prefill is not None
    for text in ("full", f"slim:{SCHEDULE}", "snapkv:budget=0.5:window=8"):
        list(graphed.stream(build(text, graphed), Request(PROMPT, 1)))
    runs = {(layers.start, layers.stop, size) for layers, size in graphed.prefill._replays}
    assert runs == {(0, 6, 256), (0, 1, 256), (2, 3, 256), (4, 6, 128)}


class Loud(Slim):
    """Overrides a hook and says nothing of where it acts."""

    def attend(self, layer: int, heads: Heads, step: Step) -> torch.Tensor:
        return super().attend(layer, heads, step)


class Quiet(Full):
    """Overrides no hook."""


def test_who_overrides_a_hook_acts_everywhere() -> None:
    plain, _ = engines()
    assert acting_layers(Quiet(Full.Options(), plain.context)) == set()
    options = build(f"slim:{SCHEDULE}", plain).options
    assert acting_layers(Slim(options, plain.context)) == {1, 3}
    assert acting_layers(Loud(options, plain.context)) == set(range(LAYERS))
    sparse = Quiet(Full.Options(), plain.context)
    sparse.sparse = Quiet(Full.Options(), plain.context)
    assert acting_layers(sparse) == set(range(LAYERS))


def test_timed_parts_take_the_hooks() -> None:
    _, graphed = engines()
    assert graphed.prefill is not None
    graphed.context.stopwatch.start(torch.device("cpu"))
    with torch.inference_mode():
        graphed.read(build("full", graphed), Request(PROMPT, 1))
    assert graphed.context.stopwatch.stop()["attention"] > 0
    assert not graphed.prefill._replays


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 2047, 2049, 5000, 100_000])
def test_padding_is_a_sixteenth_at_most(rows: int) -> None:
    assert rows <= padded(rows) <= rows + max(127, rows / 16)
    assert padded(rows) % 128 == 0
