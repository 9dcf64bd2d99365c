from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.engine.method import causal_pairs
from harness.engine.request import Request
from harness.engine.shape import ModelShape
from harness.measuring import roofline
from harness.measuring.ledger import model_bytes
from harness.measuring.roofline import (
    Ceilings,
    ceilings,
    decode_bytes,
    dense_prefill_flops,
    fractions,
    measure_ceilings,
    prefill_flops,
    remembered_ceilings,
)
from tests.tiny import build, random_ids, tiny_engine, tiny_model, tiny_shape

LLAMA = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
CPU = torch.device("cpu")


SIDE, COPIED = 256, 2**22


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is multiplied and copied."""
    for device in ("cpu", "meta"):
        monkeypatch.setitem(roofline._SIDE, device, SIDE)
        monkeypatch.setitem(roofline._COPIED, device, COPIED)


@pytest.fixture
def quick(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and measurements that last milliseconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "_best", lambda device, work: 0.5)
    monkeypatch.setattr(roofline, "_lasting", lambda device, work: 1.0)
    monkeypatch.setattr(roofline, "_QUIET", 0.0)
    return tmp_path / "harness" / "ceilings"


def test_the_weights_of_a_layer_are_the_published_ones() -> None:
    assert LLAMA.project_params + LLAMA.feed_params == LLAMA.linear_params == 218_103_808
    assert LLAMA.project_params == 4096 * (4096 + 1024 + 1024) and LLAMA.head_params == 4096 * 128256


def test_dense_prefill_is_two_per_weight_and_four_per_pair_and_channel() -> None:
    n = 32768
    linear, attention = 2 * 218_103_808 * n, 4 * 4096 * n * (n + 1) // 2
    assert dense_prefill_flops(LLAMA, n) == 32 * (linear + attention) + 2 * 4096 * 128256


@pytest.mark.parametrize("heads", ["GQA", "MHA", "MQA"])
def test_the_formula_counts_what_pytorch_counts(heads: str) -> None:
    n, engine, shape = 96, tiny_engine(heads=heads), tiny_shape(heads)
    method = build("full", engine)
    with FlopCounterMode(display=False) as counter:
        next(engine.stream(method, Request(random_ids(n), 1)))
    by_operator: dict[Any, int] = counter.get_flop_counts()["Global"]
    attention = sum(flops for operator, flops in by_operator.items() if "attention" in str(operator))
    rows, angles = [n] * shape.layers, 2 * n * shape.head_dim // 2
    assert counter.get_total_flops() - attention - angles == prefill_flops(shape, rows, rows, [0] * shape.layers)
    # PyTorch counts future pairs too, where it counts the kernel at all.
    assert attention in (0, 4 * shape.heads * shape.head_dim * n * n * shape.layers)


def test_pruned_layers_cost_what_passes_them() -> None:
    shape = ModelShape("llama", 2, 8, 16, 2, 1, 4, 10, 100)
    assert prefill_flops(shape, [5, 3], [3, 3], [15, 6]) == (
        2 * 8 * 4 * (2 + 2) * (5 + 3) + 2 * (8 * 8 + 3 * 8 * 16) * (3 + 3) + 4 * 2 * 4 * (15 + 6) + 2 * 8 * 10
    )
    assert [causal_pairs(n) for n in (0, 1, 4)] == [0, 1, 10]


def test_one_number_a_layer_is_needed() -> None:
    with pytest.raises(ValueError, match="2 numbers"):
        prefill_flops(ModelShape("llama", 2, 8, 16, 2, 1, 4, 10, 100), [1, 1], [1, 1], [1])


def test_the_engine_reads_all_weights_but_the_embedding_table() -> None:
    model, engine, shape = tiny_model(), tiny_engine(), tiny_shape()
    table = model.model.embed_tokens.weight.nbytes
    assert engine.decode_weight_bytes == pytest.approx(model_bytes(model) - table, rel=0.001)
    matrices = 4 * (shape.layers * shape.linear_params + shape.head_params)
    assert matrices <= engine.decode_weight_bytes <= 1.01 * matrices


def ceiling(**changes: Any) -> Ceilings:
    values: dict[str, Any] = {"gemm_flops": 100.0, "copy_bytes_per_s": 10.0, "device": "d", "dtype": "bfloat16"}
    return Ceilings(**(values | {"torch": "2", "threads": 0, "quiet": True} | changes))


def test_fractions_are_floor_over_measured_time() -> None:
    found = fractions(ceiling(), flops=500, weights_bytes=20, kv_read_bytes=10, ttft_s=10.0, tpot_s=4.0)
    assert (found.prefill_floor_s, found.prefill, found.decode_floor_s, found.decode) == (5.0, 0.5, 3.0, 0.75)
    assert decode_bytes(20, 10) == 30
    assert found.prefill_lasting_floor_s is None
    lasting = fractions(ceiling(gemm_flops_sustained=80.0), 500, 20, 10, ttft_s=10.0, tpot_s=4.0)
    assert lasting.prefill_lasting_floor_s == 6.25 and lasting.prefill == 0.5


def test_what_crosses_the_host_link_has_a_floor_of_its_own() -> None:
    asked: dict[str, Any] = {"flops": 500, "weights_bytes": 20, "kv_read_bytes": 10, "ttft_s": 10.0, "tpot_s": 4.0}
    linked, alone = ceiling(host_bytes_per_s=2.0), fractions(ceiling(), **asked)
    found = fractions(linked, **asked, bus_bytes=7.0)
    assert found.decode_bus_floor_s == 3.5 and (found.decode_floor_s, found.decode) == (3.0, 0.75)
    assert fractions(linked, **asked, bus_bytes=0.0).decode_bus_floor_s == 0.0
    assert fractions(ceiling(), **asked, bus_bytes=7.0) == fractions(linked, **asked) == alone
    assert alone.decode_bus_floor_s is None


def test_a_short_prefill_is_bound_by_its_weights_and_nothing_measured_is_null() -> None:
    found = fractions(ceiling(), flops=1, weights_bytes=20, kv_read_bytes=10, ttft_s=None, tpot_s=None)
    assert found.prefill_floor_s == 2.0 and found.prefill is None and found.decode is None


def test_ceilings_are_measured_once(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remembered_ceilings() == []
    first = ceilings(CPU, torch.float32)
    assert first.gemm_flops == 2 * SIDE**3 / 0.5 and first.copy_bytes_per_s == 2 * COPIED / 0.5
    assert first.threads == torch.get_num_threads() and first.dtype == "float32" and first.device
    monkeypatch.setattr(roofline, "_best", lambda device, work: pytest.fail("measured again"))
    assert ceilings(CPU, torch.float32) == first and remembered_ceilings() == [first]


def test_other_dtypes_threads_and_versions_are_measured_anew(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings(CPU, torch.float32)
    ceilings(CPU, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        ceilings(CPU, torch.float32)
    monkeypatch.setattr(torch, "__version__", "9.9")
    ceilings(CPU, torch.float32)
    assert len(remembered_ceilings()) == len(list(quick.iterdir())) == 4


def test_measuring_again_never_lowers_a_ceiling(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ceilings(CPU, torch.float32)
    monkeypatch.setattr(roofline, "_best", lambda device, work: 5.0)
    assert measure_ceilings(CPU, torch.float32) == first
    monkeypatch.setattr(roofline, "_best", lambda device, work: 0.25)
    assert measure_ceilings(CPU, torch.float32).gemm_flops == 2 * first.gemm_flops


def test_what_was_measured_on_a_busy_machine_is_measured_again(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(roofline, "_QUIET", 1e9)
        first = ceilings(CPU, torch.float32)
    monkeypatch.setattr(roofline, "_best", lambda device, work: 0.25)
    second = ceilings(CPU, torch.float32)
    assert not first.quiet and second.quiet and second.gemm_flops == 2 * first.gemm_flops
    monkeypatch.setattr(roofline, "_best", lambda device, work: 0.125)
    assert ceilings(CPU, torch.float32) == second


def test_a_link_to_the_host_that_was_not_measured_yet_is(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("meta")
    monkeypatch.setattr(roofline, "_name", lambda device: "a card")
    monkeypatch.setattr(roofline, "_host_rate", lambda device: 0.0)
    older = ceilings(device, torch.float32)
    monkeypatch.setattr(roofline, "_host_rate", lambda device: 5.0)
    assert older.host_bytes_per_s == 0 and ceilings(device, torch.float32).host_bytes_per_s == 5
    monkeypatch.setattr(roofline, "_host_rate", lambda device: pytest.fail("measured again"))
    assert ceilings(device, torch.float32).host_bytes_per_s == 5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gemm_flops": 1}'])
def test_a_broken_note_is_measured_again(quick: Path, text: str) -> None:
    first = ceilings(CPU, torch.float32)
    (note,) = quick.iterdir()
    note.write_text(text)
    assert remembered_ceilings() == [] and ceilings(CPU, torch.float32) == first


def test_a_cache_that_cannot_be_written_costs_only_time(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(roofline, "_best", lambda device, work: 0.5)
    monkeypatch.setattr(roofline, "_lasting", lambda device, work: 1.0)
    assert ceilings(CPU, torch.float32).gemm_flops > 0 and remembered_ceilings() == []


def test_real_ceilings_of_this_machine_are_plausible(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    found = measure_ceilings(CPU, torch.float32)
    assert 1e9 < found.gemm_flops < 1e14 and 1e8 < found.copy_bytes_per_s < 1e13 and math.isfinite(found.gemm_flops)
