"""Where keys and values wait: what is copied, and which memory is kept for the requests that follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.engine.cache import LayerCache
from harness.errors import InputError
from methods.common.host_store import HostStore, Offload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KV_HEADS, HEAD_DIM = 2, 8
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 4
OFFLOADS: tuple[Offload, ...] = ("async", "sync", "none")


def filled(tokens: int, spare: int = 3) -> LayerCache:
    cache = LayerCache(spare)
    keys, values = torch.randn(2, tokens, KV_HEADS, HEAD_DIM, device=DEVICE)
    cache.append(keys, values, torch.arange(tokens, device=DEVICE))
    return cache


def through(store: HostStore) -> None:
    store.wait()
    if DEVICE == "cuda":
        torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_everything_is_copied_and_outlives_the_cache(offload: Offload) -> None:
    store = HostStore(offload)
    for tokens in (9, 12, 5):
        cache = filled(tokens)
        keys, values = cache.keys.clone(), cache.values.clone()
        store.copy_out(cache)
        cache.reset()
        # Would be what the copy reads, if the freed memory were handed out before it is through.
        torch.randn(2, tokens + 3, KV_HEADS, HEAD_DIM, device=DEVICE)
        through(store)
        assert torch.equal(store.keys.to(DEVICE), keys) and torch.equal(store.values.to(DEVICE), values)
        assert store.nbytes == tokens * TOKEN_BYTES
        assert store.spare_nbytes == (store.held_nbytes - store.nbytes if DEVICE == "cpu" else 0)
        assert store.keys.device.type == (DEVICE if offload == "none" else "cpu")
        store.forget()
        assert store.nbytes == 0 and len(store.keys) == 0


def test_what_is_freed_at_once_is_copied_all_the_same() -> None:
    if DEVICE == "cpu":
        pytest.skip("a copy on a CPU is done when it returns")
    store, tokens = HostStore("async"), 1 << 20
    for _ in range(3):
        cache = filled(tokens)
        keys = cache.keys.cpu()
        store.copy_out(cache)
        cache.reset()
        overwriting = [torch.zeros(tokens + 3, KV_HEADS, HEAD_DIM, device=DEVICE) for _ in range(4)]
        through(store)
        assert torch.equal(store.keys, keys)
        del overwriting


def test_memory_and_its_addresses_stay_while_requests_fit() -> None:
    store = HostStore("async")
    assert store.addresses.numel() == 0
    held, tensors = [], []
    # 41 need more than 40 have; 11 are less than a fourth of what 41 are given.
    for tokens in (40, 17, 33, 41, 12, 11):
        store.forget()
        store.copy_out(filled(tokens))
        assert store.addresses.tolist() == [store.keys.data_ptr(), store.values.data_ptr()]
        held.append(store.held_nbytes // TOKEN_BYTES)
        tensors.append(store.addresses)
    assert held == [40, 40, 40, 48, 48, 12] and all(tensor is tensors[0] for tensor in tensors)


def test_memory_of_the_device_is_not_kept() -> None:
    store = HostStore("none")
    for tokens in (41, 40):
        store.copy_out(filled(tokens))
        assert store.addresses.tolist() == [store.keys.data_ptr(), store.values.data_ptr()]
        assert store.held_nbytes == store.nbytes == tokens * TOKEN_BYTES
        store.forget()
        assert store.held_nbytes == 0


def test_a_host_without_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store, cache, empty = HostStore("async"), filled(64), torch.empty

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        if "pin_memory" in options:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*shape, **options)

    store.copy_out(filled(9))
    with monkeypatch.context() as patch:
        patch.setattr("methods.common.host_store.torch.empty", full)
        with pytest.raises(InputError, match="no 0.00 GiB of host memory for parked tokens; offload=none"):
            store.copy_out(cache)
    assert store.nbytes == store.held_nbytes == 0
    store.copy_out(cache)
    assert store.nbytes == 64 * TOKEN_BYTES
