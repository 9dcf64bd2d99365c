from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor

from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.step import Heads, Step
from harness.measuring.ledger import TOLERANCE, AllocatorPeak, Ledger, TensorMemory, ledger, model_bytes
from harness.runner.catalog import METHODS
from methods.full import Full
from tests.tiny import VOCAB, build, random_ids, tiny_engine, tiny_model

KIB = 1024
LENGTH, NEW = 512, 8


@pytest.fixture(scope="module", autouse=True)
def garbage_is_looked_for_in_what_is_new() -> None:
    """A ledger collects garbage twice a request; what is loaded until now stays, and need not be looked at."""
    tiny_engine()
    gc.collect()
    gc.freeze()


def block(kib: int = 1) -> Tensor:
    return torch.empty(kib * 256)


@contextmanager
def watched(*baseline: Tensor) -> Iterator[TensorMemory]:
    gc.collect()
    with torch.inference_mode(), TensorMemory(baseline) as memory:
        yield memory


def test_what_is_made_counts_until_its_last_view_is_gone() -> None:
    with watched() as memory:
        a = block(4)
        view = a[:10].view(5, 2).t()
        assert memory.current() == 4 * KIB
        del a
        assert memory.current() == 4 * KIB
        del view
        assert memory.current() == 0 and memory.peak() == 4 * KIB


def test_views_in_place_operators_and_out_add_nothing() -> None:
    with watched() as memory:
        a, b = block(), block()
        a.add_(1)
        a[3:].fill_(2)
        torch.add(a, b, out=b)
        a.unsqueeze(0).expand(5, -1)
        a.to(torch.float32)
        assert memory.current() == memory.peak() == 2 * KIB


def test_the_peak_is_the_highest_sum_and_starts_again() -> None:
    with watched() as memory:
        a = block(2)
        b = block(3)
        del a
        c = block(1)
        assert memory.current() == 4 * KIB and memory.peak() == 5 * KIB
        memory.reset_peak()
        assert memory.peak() == 4 * KIB
        del b, c
    assert memory.current() == 0


def test_operands_of_an_operator_overlap_with_its_result() -> None:
    with watched() as memory:
        a = block(8)
        a = a + a
        assert memory.peak() == 16 * KIB and memory.current() == 8 * KIB


def test_what_was_there_before_counts_only_where_it_is_given() -> None:
    old, known = block(8), block(2)
    with watched(known) as memory:
        kept = [old[3:], old.t(), old.add_(1), known.view(2, -1)]
        assert memory.current() == 2 * KIB
        del old, kept
        assert memory.current() == 2 * KIB
        del known
        gc.collect()
    assert memory.current() in (0, 2 * KIB)


def test_an_old_tensors_address_may_be_used_again() -> None:
    held = [block(8)]
    with watched() as memory:
        for _ in range(20):
            held.pop().add_(1)
            held.append(block(8))
            assert memory.current() == 8 * KIB


def test_tensors_from_outside_the_dispatcher_are_new() -> None:
    with watched() as memory:
        made = torch.tensor([1.0, 2.0])
        assert memory.current() == made.nbytes == 8


def test_operators_made_of_others_are_followed_inside() -> None:
    """`reshape` of a transposed tensor copies; `linear` does not, whatever it calls."""
    x = torch.ones(64, 32)
    layer = torch.nn.Linear(32, 16)
    with watched() as memory:
        flat = x.t().reshape(-1)
        assert memory.current() == flat.nbytes == x.nbytes
        del flat
        out = layer(x)
        assert memory.current() == out.nbytes == 64 * 16 * 4


def test_resizing_is_followed() -> None:
    with watched() as memory:
        a = block(1)
        a.resize_(1024)
        assert memory.current() == 4 * KIB


def test_meta_tensors_take_nothing_and_other_devices_are_apart() -> None:
    with watched() as memory:
        torch.empty(1000, device="meta") + 1
        assert memory.current() == memory.current("meta") == memory.current("cuda") == 0


def test_the_makers_of_what_is_alive_are_named() -> None:
    with watched() as memory:
        a, b = block(4), torch.ones(256)
        here = f"{__name__}:{test_the_makers_of_what_is_alive_are_named.__name__}"
        assert memory.sites() == {f"{__name__}:block": 4 * KIB, here: KIB}
        assert memory.sites(without=[a]) == {here: KIB}
        del b


def test_a_closed_watch_lets_go_of_everything() -> None:
    weights = block()
    with watched() as memory:
        weights.add_(1)
        kept = block(2)
    del kept
    assert memory.current() == 2 * KIB
    gone = weakref.ref(memory)
    del memory
    gc.collect()
    assert gone() is None


def test_tied_weights_count_once() -> None:
    layer, tied = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    tied.weight = layer.weight
    assert model_bytes(torch.nn.Sequential(layer, tied)) == model_bytes(layer, tied) == 64
    layer.register_buffer("view", layer.weight.data[:2])
    assert model_bytes(layer) == 64


def test_there_is_no_allocator_to_ask_on_a_cpu() -> None:
    allocator = AllocatorPeak(torch.device("cpu"))
    assert allocator.peak() is allocator.growth() is allocator.peak_growth() is None


@cache
def account(text: str, length: int = LENGTH, new: int = NEW) -> Ledger:
    engine = tiny_engine()
    return ledger(engine, build(text, engine), Request(random_ids(length), new))


METHOD_TEXTS = [
    "full",
    "slim:budgets=0.75/0.5/0.375",
    "lazyllm",
    "quest:budget=128",
    "streaming:window=64",
    "streaming:mode=evict:window=64",
    "ashape:sinks=4:window=64",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", METHOD_TEXTS)
def test_the_ledger_is_deterministic_and_json(text: str) -> None:
    engine = tiny_engine()
    method = build(text, engine)
    list(engine.stream(method, Request(random_ids(100), 4)))
    found = ledger(engine, method, Request(random_ids(LENGTH), NEW))
    assert found == account(text)
    values = dataclasses.asdict(found)
    assert json.loads(json.dumps(values)) == values and found.allocator_peak is None


def engine_leftovers(rows: int) -> int:
    """Bytes that the engine holds when the first token is out, whatever the method: see the ledger's documentation."""
    angles, positions, prompt, last = 2 * rows * 16 * 4, 0, LENGTH * 8, VOCAB * 4 + 8
    return angles + positions + prompt + last


@pytest.mark.parametrize(
    ("text", "positions", "rows"),
    [
        # Positions: 8 bytes for each token that a layer's cache has room for, the spare room for new tokens included.
        ("full", 6 * (LENGTH + NEW), LENGTH),
        ("quest:budget=128", 6 * (LENGTH + NEW), LENGTH),
        ("ashape:sinks=4:window=64", 6 * (LENGTH + NEW), LENGTH),
    ],
)
def test_the_rest_of_a_dense_prefill_is_positions_angles_prompt_and_logits(
    text: str, positions: int, rows: int
) -> None:
    found = account(text)
    assert found.unexplained == 8 * positions + engine_leftovers(rows)
    assert found.reason is not None and "harness.engine.rotary:Rotary._angles_at 65536" in found.reason


@pytest.mark.parametrize("text", METHOD_TEXTS)
def test_reports_and_tensors_agree_or_the_ledger_says_why(text: str) -> None:
    found = account(text)
    request = found.total_after_prefill - found.weights
    # On a CPU host memory counts too, and what is parked there is there from the prefill on.
    assert found.unexplained == request - found.kv_after_prefill - found.extra - found.kv_host
    assert found.unexplained_share == pytest.approx(found.unexplained / request)
    # All of it is the engine's own and the index tensors': no keys, values or hidden states are hidden.
    assert 0 <= found.unexplained <= 6 * 8 * (LENGTH + NEW) + 8 * 3 * LENGTH + engine_leftovers(LENGTH)
    assert (found.reason is not None) == (max(found.unexplained_share, steady_share(found)) > TOLERANCE)


def steady_share(found: Ledger) -> float:
    return found.unexplained_steady / (found.total_steady - found.weights)


def test_what_the_engine_leaves_grows_with_one_layer_and_the_ledger_with_all() -> None:
    """The share of a real model is small: one pair of angles for all its layers, not six layers' for one."""
    deep = tiny_engine(layers=30)
    found = ledger(deep, build("full", deep), Request(random_ids(LENGTH), NEW))
    beyond_positions = found.unexplained - 8 * 30 * (LENGTH + NEW)
    assert beyond_positions == engine_leftovers(LENGTH) and beyond_positions < TOLERANCE * found.kv_after_prefill


def test_pruning_shows_in_the_ledger() -> None:
    full, slim, lazyllm, quest, streaming, _, _ = map(account, METHOD_TEXTS)
    assert slim.kv_after_prefill < full.kv_after_prefill and slim.activation_peak < full.activation_peak
    assert lazyllm.extra > 0 and quest.extra > 0 and full.extra == full.kv_host == 0
    assert quest.kv_after_prefill == full.kv_after_prefill > streaming.kv_after_prefill
    frequencies = tiny_model().model.rotary_emb
    assert full.weights == slim.weights == model_bytes(tiny_model()) - model_bytes(frequencies)


class Hoarder(Full):
    """Keeps a copy of every key and says nothing of it."""

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        super().begin(prompt_len, max_new_tokens)
        self.hoard: list[Tensor] = []

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        self.hoard.append(heads.k.clone())
        return super().attend(layer, heads, step)


def test_what_a_method_hides_is_found_and_its_maker_named() -> None:
    engine = tiny_engine()
    method = Hoarder(Full.Options(), engine.context)
    found = ledger(engine, method, Request(random_ids(LENGTH), NEW))
    hidden = 6 * LENGTH * 2 * 16 * 4
    assert found.unexplained == account("full").unexplained + hidden
    assert found.reason is not None and f"{__name__}:Hoarder.attend {hidden}" in found.reason


def test_the_request_before_is_no_part_of_this_one() -> None:
    engine = tiny_engine()
    method = Hoarder(Full.Options(), engine.context)
    request = Request(random_ids(LENGTH), NEW)
    first = ledger(engine, method, request)
    list(engine.stream(method, Request(random_ids(4 * LENGTH), 2)))
    assert ledger(engine, method, request) == first


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_has_a_ledger(name: str) -> None:
    found = account(name, 200, 2)
    assert found.weights > 0 and found.activation_peak > 0 and found.kv_after_prefill > 0


def test_a_method_of_the_base_class_needs_no_prompt_of_its_own() -> None:
    engine = tiny_engine()
    method = Method(Method.Options(), engine.context)
    assert ledger(engine, method, Request(random_ids(1), 1)).kv_after_prefill > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_allocator_agrees_with_the_tensors_on_cuda() -> None:
    torch.ones(1, device="cuda")
    allocator = AllocatorPeak(torch.device("cuda"))
    with watched() as memory:
        a = torch.empty(2**20, dtype=torch.uint8, device="cuda")
        b = torch.empty(2**20, dtype=torch.uint8, device="cuda")
        del a
        assert memory.current("cuda") == allocator.growth() == b.nbytes and memory.current() == 0
        assert memory.peak("cuda") == allocator.peak_growth() == 2 * 2**20
