"""SlimInfer's KV cache manager: what decode brings in, from where, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from harness.conformance.tiny import random_ids, tiny_model, tiny_shape
from harness.engine.engine import Engine
from harness.engine.request import Request
from harness.errors import InputError
from harness.runner.catalog import parse_methods
from methods.common.active_blocks import ActiveBlocks
from methods.common.active_state import NONE
from methods.slim import Slim
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import stock_verbs

for name in ("rowwise", "gemv", "decode_attention", "fetch"):
    kernels(name)

SCHEDULE = "slim:layers=1/2:budgets=48/32:block=8:unit=4"
SHARES = "slim:layers=1/2:budgets=0.5/0.25:block=8:unit=4:gamma=1"
EAGER = "gamma=1", "gamma=0.5", "gamma=0"


def engine(kind: str = "stock") -> Engine:
    return Engine(copy.deepcopy(tiny_model(layers=3)).to(DEVICE), tiny_shape(layers=3), kind=kind)


def attention_alone() -> Engine:
    """Decodes on resident caches, with the stock verbs."""
    on = engine("graphed")
    stock_verbs(on, engine())
    return on


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return random_ids(length, seed).to(DEVICE)


def build(text: str, on: Engine) -> Slim:
    (spec,) = parse_methods(text)
    method = spec.build(on.context)
    assert isinstance(method, Slim)
    return method


def held(method: Slim) -> list[tuple[list[int], torch.Tensor]]:
    return [(cache.token_positions.tolist(), cache.keys.clone()) for cache in method.cache]


def same_caches(method: Slim, expected: Slim) -> None:
    for ours, theirs in zip(held(method), held(expected), strict=True):
        assert ours[0] == theirs[0] and torch.allclose(ours[1], theirs[1], atol=1e-4)


@pytest.mark.parametrize("length", [150, 149, 96])
def test_where_blocks_wait_changes_no_token_and_no_cache(length: int) -> None:
    on, request = engine(), Request(ids(length), 12)
    methods = [build(f"{SCHEDULE}:gamma=1:offload={offload}", on) for offload in ("async", "sync", "none")]
    answers = [list(on.stream(method, request)) for method in methods]
    assert answers[0] == answers[1] == answers[2]
    for method in methods[1:]:
        for ours, theirs in zip(held(methods[0]), held(method), strict=True):
            assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert methods[0].notes() == methods[1].notes() == methods[2].notes()
    assert methods[0].notes()["kv_bytes_moved"] > 0
    assert methods[0].kv_bytes_host() > 0 == methods[2].kv_bytes_host()
    assert methods[2].kv_bytes() == methods[0].kv_bytes() + methods[0].kv_bytes_host()


@pytest.mark.parametrize("options", EAGER)
def test_what_decode_brings_in_is_what_the_prefill_had_computed(options: str) -> None:
    on, prompt = engine(), ids(150)
    full = next(iter(parse_methods("full"))).build(on.context)
    list(on.stream(full, Request(prompt, 1)))
    method = build(f"{SCHEDULE}:{options}", on)
    list(on.stream(method, Request(prompt, 9)))
    # Layer 0 saw the whole prompt, so its keys are full attention's wherever they ended up.
    cache = method.cache[0]
    old = cache.token_positions < 150
    assert torch.equal(cache.keys[old], full.cache[0].keys[cache.token_positions[old]])
    assert len(set(cache.token_positions.tolist())) == cache.length


@torch.inference_mode()
def test_a_swap_moves_what_is_missing_and_counts_it() -> None:
    on = engine()
    method = build(f"{SCHEDULE}:gamma=1", on)
    list(on.stream(method, Request(ids(150), 1)))
    method.replay()
    active = method.active[0]
    before = active.active.clone()
    wanted = before.clone()
    absent = next(block for block in range(18) if block not in before.tolist())
    wanted[1] = absent
    (source,) = active.state.reselect(wanted.sort().values.unsqueeze(0), 1.0)
    assert (source >= 0).sum() == 1 and source[1] == absent
    active.bring_in(source)
    assert active.moved == 1 and active.swaps == 1
    assert active.state.reselect(before.unsqueeze(0), 0.5).max() == -1 and active.swaps == 1


@pytest.mark.parametrize("text", [f"{SCHEDULE}:gamma=1", SHARES])
def test_one_recording_serves_prompts_of_many_lengths(text: str) -> None:
    plain, replayed = engine(), attention_alone()
    method, keys = build(text, replayed), []
    # In blocks of 8: 16 of them, fewer in the same memory, more, and far fewer than that.
    for length in (128, 99, 70, 300, 56):
        request, expected = Request(ids(length, seed=length), 3), build(text, plain)
        assert list(replayed.stream(method, request)) == list(plain.stream(expected, request))
        assert method.notes() == expected.notes() and method.notes()["kv_bytes_moved"] > 0
        same_caches(method, expected)
        keys.append(method.replay().key())
    assert keys[0] == keys[1] == keys[2] and len(set(keys[2:])) == 3


def test_what_is_reported_is_the_request_s_own_but_for_what_the_device_holds() -> None:
    on = engine()
    fresh, method = build(f"{SCHEDULE}:gamma=1", on), build(f"{SCHEDULE}:gamma=1", on)
    long, short = Request(ids(150), 3), Request(ids(100), 3)
    list(on.stream(fresh, short))
    list(on.stream(method, long))
    list(on.stream(method, short))
    assert method.kv_bytes() == fresh.kv_bytes() and method.notes() == fresh.notes()
    assert method.kv_bytes_host() == fresh.kv_bytes_host() == 2 * (100 + 44) * 2 * 16 * 4
    assert method.extra_bytes() > fresh.extra_bytes()
    list(on.stream(method, Request(ids(20), 3)))
    assert method.active == {} and method.kv_bytes_host() == 0 == method.extra_bytes() and method.notes() == {}


def test_requests_leave_nothing_behind() -> None:
    on = engine()
    method = build(f"{SCHEDULE}:gamma=1", on)

    def serve(count: int) -> int:
        for number in range(count):
            list(on.stream(method, Request(ids(100 + 8 * (number % 3), seed=number), 3)))
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert serve(3) == serve(18)


def test_a_host_without_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    on = engine()
    method = build(f"{SCHEDULE}:offload=async", on)

    empty = torch.empty

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        if "pin_memory" in options:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*shape, **options)

    stream = on.stream(method, Request(ids(150), 2))
    with monkeypatch.context() as patch:
        patch.setattr("methods.common.host_store.torch.empty", full)
        with pytest.raises(InputError, match="GiB of host memory for parked tokens; offload=none"):
            next(stream)
    assert len(list(on.stream(method, Request(ids(150), 2)))) == 2


@torch.inference_mode()
def test_a_step_that_ran_only_to_be_recorded_is_taken_back() -> None:
    on = attention_alone()
    method, table = build(f"{SCHEDULE}:gamma=1", on), on.table
    assert table is not None
    # Eager steps, which stay.
    list(on.stream(method, Request(ids(100), 4), eager=True))
    before, notes = held(method), method.notes()
    table.load(method.cache)
    for layer, active in method.active.items():
        method._replay._fetch(layer, active.state.reselect(others(active).unsqueeze(0), 1.0)[0], table)
        active.settle()
    assert method.notes() != notes and held(method)[0][0] != before[0][0]
    method._replay.undo(table)
    for active in method.active.values():
        active.settle()
    for ours, theirs in zip(held(method), before, strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert method.notes() == notes


def others(active: ActiveBlocks) -> torch.Tensor:
    """The first blocks that are not active, and the last."""
    known = [block for block in active.active.tolist() if block != NONE]
    vacant = [NONE] * (len(active.active) - len(known))
    first = sorted(range(known[-1]), key=lambda block: (block in known, block))[: len(known) - 1]
    return torch.tensor([*sorted(first), known[-1], *vacant], device=DEVICE)


def test_eager_steps_ahead_of_replayed_ones_stay() -> None:
    plain, replayed = engine(), attention_alone()
    request = Request(ids(150), 7, min_new_tokens=4)
    expected, method = build(f"{SCHEDULE}:gamma=1", plain), build(f"{SCHEDULE}:gamma=1", replayed)
    assert list(replayed.stream(method, request)) == list(plain.stream(expected, request))
    assert method.notes() == expected.notes()
    same_caches(method, expected)


def test_a_request_that_ends_with_its_first_token_parks_nothing_and_reports_nothing() -> None:
    method = build(SCHEDULE, on := engine())
    for count, swapped in ((1, False), (40, True), (1, False)):
        list(on.stream(method, Request(ids(150), count)))
        notes = method.notes()
        assert bool(notes["kv_bytes_moved"]) == swapped and any(notes["kv_swaps"].values()) == swapped
        method.end()
