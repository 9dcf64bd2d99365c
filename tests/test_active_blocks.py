"""SlimInfer's KV cache manager: what decode brings in, from where, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.engine import Engine, Request
from harness.errors import InputError
from harness.tiny import random_ids, tiny_model, tiny_shape
from methods.active_blocks import ActiveBlocks
from methods.registry import parse_methods
from methods.slim import Slim
from tests.reference.interpreter import DEVICE, kernels

for name in ("rowwise", "gemv", "decode_attention", "fetch"):
    kernels(name)

SCHEDULE = "slim:layers=1/2:budgets=48/32:block=8:unit=4"
EAGER = "gamma=1", "gamma=0.5", "gamma=0"


def engine(kind: str = "stock") -> Engine:
    return Engine(copy.deepcopy(tiny_model(layers=3)).to(DEVICE), tiny_shape(layers=3), kind=kind)


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return random_ids(length, seed).to(DEVICE)


def build(options: str, on: Engine) -> Slim:
    (spec,) = parse_methods(f"{SCHEDULE}:{options}")
    method = spec.build(on.context)
    assert isinstance(method, Slim)
    return method


def held(method: Slim) -> list[tuple[list[int], torch.Tensor]]:
    return [(cache.positions.tolist(), cache.keys.clone()) for cache in method.cache]


@pytest.mark.parametrize("length", [150, 149, 96])
def test_where_blocks_wait_changes_no_token_and_no_cache(length: int) -> None:
    on, request = engine(), Request(ids(length), 12)
    methods = [build(f"gamma=1:offload={offload}", on) for offload in ("async", "sync", "none")]
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
    method = build(options, on)
    list(on.stream(method, Request(prompt, 9)))
    # Layer 0 saw the whole prompt, so its keys are full attention's wherever they ended up.
    cache = method.cache[0]
    old = cache.positions < 150
    assert torch.equal(cache.keys[old], full.cache[0].keys[cache.positions[old]])
    assert len(set(cache.positions.tolist())) == cache.length


def test_replayed_steps_bring_in_the_same_blocks() -> None:
    plain, replayed = engine(), engine("graphed")
    expected, method = build("gamma=1", plain), build("gamma=1", replayed)
    for length in (100, 100, 90):
        request = Request(ids(length, seed=length), 5)
        assert list(replayed.stream(method, request)) == list(plain.stream(expected, request))
        assert method.static_decode() and method.notes() == expected.notes()
        for ours, theirs in zip(held(method), held(expected), strict=True):
            assert ours[0] == theirs[0] and torch.allclose(ours[1], theirs[1], atol=1e-4)


@torch.inference_mode()
def test_a_swap_moves_what_is_missing_and_counts_it() -> None:
    on = engine()
    method = build("gamma=1", on)
    list(on.stream(method, Request(ids(150), 1)))
    method.static_decode()
    active = method.active[0]
    before = active._active.clone()
    wanted = before.clone()
    absent = next(block for block in range(18) if block not in before.tolist())
    wanted[1] = absent
    q = torch.zeros(1, 4, 16, device=DEVICE)
    source = active.reselect(q, lambda _: wanted.sort().values, 1.0)
    assert (source >= 0).sum() == 1 and source[1] == absent
    active.bring_in(source, 0, None)
    assert active.moved == 1 and active.swaps == 1
    assert active.reselect(q, lambda _: before, 0.5).max() == -1 and active.swaps == 1


def test_requests_of_one_length_share_memory_and_others_do_not() -> None:
    on = engine()
    method = build("gamma=1", on)
    list(on.stream(method, Request(ids(150), 3)))
    first, key = method.active[0], method.capture_key()
    list(on.stream(method, Request(ids(150, seed=1), 3)))
    assert method.active[0] is first and method.capture_key() == key
    list(on.stream(method, Request(ids(120), 3)))
    assert method.active[0] is not first
    list(on.stream(method, Request(ids(20), 3)))
    assert method.active == {} and method.kv_bytes_host() == 0 and method.notes() == {}


def test_two_hundred_requests_leave_nothing_behind() -> None:
    on = engine()
    method = build("gamma=1", on)

    def serve(count: int) -> int:
        for number in range(count):
            list(on.stream(method, Request(ids(100 + 8 * (number % 3), seed=number), 3)))
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert serve(3) == serve(198)


def test_a_host_without_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    on = engine()
    method = build("offload=async", on)

    empty = torch.empty

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        if "pin_memory" in options:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*shape, **options)

    stream = on.stream(method, Request(ids(150), 2))
    with monkeypatch.context() as patch:
        patch.setattr("methods.active_blocks.torch.empty", full)
        with pytest.raises(InputError, match="GiB of host memory for parked blocks; offload=none"):
            next(stream)
    assert len(list(on.stream(method, Request(ids(150), 2)))) == 2


@torch.inference_mode()
def test_a_step_that_ran_only_to_be_recorded_is_taken_back() -> None:
    on = engine("graphed")
    method, resident = build("gamma=1", on), on._resident
    assert resident is not None
    stream = on.stream(method, Request(ids(100), 4))
    next(stream)
    assert method.static_decode()
    before = held(method)
    resident.load(method.cache)
    for layer, active in method.active.items():
        source = active.reselect(torch.randn(1, 4, 16, device=DEVICE), _others(active), 1.0)
        active.bring_in(source, layer, resident)
        active.settle()
    assert method.notes()["kv_bytes_moved"] > 0 and held(method)[0][0] != before[0][0]
    method.rewind(resident)
    for active in method.active.values():
        active.settle()
    for ours, theirs in zip(held(method), before, strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert method.notes()["kv_bytes_moved"] == 0


def _others(active: ActiveBlocks) -> Callable[[torch.Tensor], torch.Tensor]:
    """Chooses the first blocks that are not active, and the last."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        known, last = set(active._active.tolist()), len(scores) - 1
        first = sorted(range(last), key=lambda block: (block in known, block))[: active.slots - 1]
        return torch.tensor([*sorted(first), last], device=DEVICE)

    return choose
