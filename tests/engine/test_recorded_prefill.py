"""Recorded prefills against layers that are launched one by one; without a GPU the recorded body runs as it is."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.conformance.tiny import tiny_model, tiny_shape
from harness.engine.engine import Engine
from harness.engine.generation import Work
from harness.engine.method import acting_hooks
from harness.engine.replay import recorded_prefill
from harness.engine.replay.recorded_prefill import padded
from harness.engine.request import Request
from harness.engine.step import Heads, Rows, Step
from harness.runner.catalog import METHODS
from methods.full import Full
from methods.slim import Slim
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import build, stock_verbs

store_rows = kernels("store_rows")
for name in ("rowwise", "gemv", "decode_attention"):
    kernels(name)

LAYERS = 6
KV_HEADS, HEAD_DIM = tiny_shape().kv_heads, tiny_shape().head_dim
PROMPT = torch.randint(0, 60, (200,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
SCHEDULE = "layers=2/4:budgets=0.75/0.5:block=16"


def engines() -> tuple[Engine, Engine]:
    """Stock, and one that records prefills, with the stock verbs."""
    model, shape = tiny_model("llama", layers=LAYERS), tiny_shape(layers=LAYERS)
    stock, recorded = (copy.deepcopy(model).to(DEVICE) for _ in range(2))
    plain, graphed = Engine(stock, shape), Engine(recorded, shape, kind="graphed")
    stock_verbs(graphed, plain)
    return plain, graphed


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["full", f"slim:{SCHEDULE}", f"slim:{SCHEDULE}:ff=all", f"random:{SCHEDULE}", "lazyllm:layers=2/4:keep=0.75/0.5",
     "lazyllm:layers=2/4:keep=0.75/0.5:revive=false", "snapkv:budget=0.5:window=8"],
)  # fmt: skip
def test_prefills_are_the_same_recorded_or_not(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_rows, "_ROWS", 8)  # as on a GPU
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


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.slow
def test_every_method_comes_out_the_same(name: str) -> None:
    text, found = f"{name}:{SCHEDULE}" if name in ("slim", "random", "recent") else name, []
    text = "lazyllm:layers=2/4:keep=0.75/0.5" if name == "lazyllm" else text
    for engine in engines():
        method, work = build(text, engine), Work()
        with torch.inference_mode():
            logits, position = engine.read(method, Request(PROMPT, 3), work)
        found.append((method, logits, position, work))
    (expected, theirs, *told), (method, ours, *tells) = found
    assert torch.allclose(ours, theirs, atol=1e-4) and tells == told
    for mine, other in zip(method.cache, expected.cache, strict=True):
        for head, known in zip(mine.heads(), other.heads(), strict=True):
            assert torch.equal(head.positions, known.positions) and torch.allclose(head.keys, known.keys, atol=1e-4)


def test_what_is_recorded_is_what_the_method_leaves_alone() -> None:
    _, graphed = engines()
    assert graphed.prefill is not None
    for text in ("full", f"slim:{SCHEDULE}", "h2o:budget=0.5:window=8"):
        list(graphed.stream(build(text, graphed), Request(PROMPT, 1)))
    spans = {(span.begin, span.end, size) for span, size in graphed.prefill._replays}
    # Three verbs a layer; a span ends ahead of what a method does itself, and behind the first two layers.
    full, attending = (
        {(0, 6, 256), (6, 18, 256)},
        {(0, 1, 256), *((verb, verb + 2, 256) for verb in (2, 5, 8, 11, 14)), (17, 18, 256)},
    )
    assert spans == full | {(0, 5, 256), (5, 11, 256), (11, 18, 128)} | attending


@pytest.mark.parametrize(
    ("text", "memory", "spans"),
    [
        ("snapkv:budget=0.5:window=8", 1 << 29, {(0, 6, 256), (6, 18, 256)}),
        ("adakv:budget=0.5:window=8", 1 << 29, {(0, 6, 256), (6, 18, 256)}),
        ("fastkv:budget=0.5:keep=0.5:window=8:cut=2", 1 << 29, {(0, 6, 256), (6, 9, 256), (9, 18, 128)}),
        # Five layers would fit, and the parts are even.
        ("knorm:budget=0.5", 5 * 4 * 256 * 2 * KV_HEADS * HEAD_DIM, {(0, 6, 256), (6, 9, 256), (9, 18, 256)}),
        ("pyramidkv:budget=0.5:window=8", 1, {(verb, verb + 3, 256) for verb in range(0, 18, 3)}),
    ],
)
def test_who_only_evicts_shares_recordings_and_chooses_for_many_layers(
    text: str, memory: int, spans: set[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_prefill, "_HELD", memory)
    plain, graphed = engines()
    expected, method = build(text, plain), build(text, graphed)
    with torch.inference_mode():
        plain.read(expected, Request(PROMPT, 3))
        graphed.read(method, Request(PROMPT, 3))
    assert graphed.prefill is not None
    assert {(span.begin, span.end, size) for span, size in graphed.prefill._replays} == spans
    for mine, other in zip(method.cache, expected.cache, strict=True):
        for head, known in zip(mine.heads(), other.heads(), strict=True):
            assert torch.equal(head.positions, known.positions) and torch.allclose(head.keys, known.keys, atol=1e-5)


class Loud(Slim):
    """Overrides a hook and says nothing of where it acts."""

    def attend(self, layer: int, heads: Heads, step: Step) -> torch.Tensor:
        return super().attend(layer, heads, step)

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        self.seen = [*getattr(self, "seen", []), heads.k]
        return super().after_layer(layer, rows, heads, step)


class Quiet(Full):
    """Overrides no hook."""


def test_who_overrides_a_hook_acts_everywhere() -> None:
    plain, _ = engines()
    assert acting_hooks(Quiet(Full.Options(), plain.context)) == [[]] * LAYERS
    options = build(f"slim:{SCHEDULE}", plain).options
    where = [["after_attention"] if layer in (1, 3) else [] for layer in range(LAYERS)]
    assert acting_hooks(Slim(options, plain.context)) == where
    assert acting_hooks(Loud(options, plain.context)) == [["attend", "after_attention", "after_layer"]] * LAYERS
    sparse = Quiet(Full.Options(), plain.context)
    sparse.sparse = Quiet(Full.Options(), plain.context)
    assert acting_hooks(sparse) == [["attend"]] * LAYERS


def test_what_a_hook_is_shown_stays_as_it_was() -> None:
    found = []
    for engine in engines():
        method = Loud(build(f"slim:{SCHEDULE}", engine).options, engine.context)
        with torch.inference_mode():
            engine.read(method, Request(PROMPT, 1))
        found.append(method.seen)
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(theirs, ours, atol=1e-5)


def test_rows_that_are_part_of_what_is_there_may_go_on() -> None:
    class Last(Full):
        def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
            return rows if layer != 2 else Rows(rows.hidden[70:], rows.positions[70:])

    logits = []
    for engine in engines():
        with torch.inference_mode():
            logits.append(engine.read(Last(Full.Options(), engine.context), Request(PROMPT, 1))[0])
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_few_recordings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_prefill, "_MOST", 4)  # two for each length
    _, graphed = engines()
    assert graphed.prefill is not None
    for length in (100, 200, 300):
        list(graphed.stream(build("full", graphed), Request(PROMPT.repeat(2)[:length], 1)))
    assert [size for _, size in graphed.prefill._replays] == [256, 256, 384, 384] and graphed.prefill.captures == 6


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
