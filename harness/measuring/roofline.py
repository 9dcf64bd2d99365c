"""How fast this device could have been: floor times of prefill and decode, and the share of them that was reached.

A prefill is bound by arithmetic: every weight of a layer meets every row that passes it (2 FLOPs a weight and row), and
every query meets every key it may see (2 FLOPs a channel for the score, 2 for the weighted value: 4 * heads * head_dim
a pair). A decode step is bound by memory traffic: all weights and the keys and values that are attended to are read for
one row. Rotary, norms and activations are left out: they are what a fused kernel would hide.

The ceilings are not data sheet figures. They are what a large matrix product and a large copy reach on this device
through the same PyTorch, measured once and remembered in the user's cache (the roofline model: Williams, Waterman and
Patterson, CACM 52(4), 2009).
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness.engine.method import causal_pairs
from harness.engine.shape import ModelShape
from harness.measuring.provenance import cpu_model
from harness.models.load import resolve_device, resolve_dtype
from harness.storage.user_cache import cache_dir, write_note

FOLDER = "ceilings"
_SECONDS = 1.0
_LEAST_RUNS = 4
_QUIET = 0.8
_SIDE = {"cuda": 8192, "cpu": 1536}
"""Of the square matrices that are multiplied."""
_COPIED = {"cuda": 2**31, "cpu": 2**28}
"""Bytes that are copied: more than caches hold."""


def prefill_flops(shape: ModelShape, projected: Sequence[int], fed: Sequence[int], pairs: Sequence[int]) -> int:
    """Floating-point operations of a prefill that did just this work, and the logits of its last row.

    sum over layers of 2 * (q, k, v weights) * projected + 2 * (o and feed-forward weights) * fed
    + 4 * heads * head_dim * pairs, plus 2 * hidden * vocab.

    Args:
        shape: the model's.
        projected: [layers] rows that went through the q, k and v projections, and as many numbers more as layers ran in
            passes beside it (`Method.prompt`, `Method.probes`).
        fed: likewise, rows that went through the output projection and the feed forward.
        pairs: likewise, query-key pairs that attention computed.

    Raises:
        ValueError: not one number a layer.
    """
    if not len(projected) == len(fed) == len(pairs) >= shape.layers:
        raise ValueError(f"projected, fed and pairs need {shape.layers} numbers each, one a layer")
    linear = 2 * (shape.project_params * sum(projected) + shape.feed_params * sum(fed))
    attention = 4 * shape.heads * shape.head_dim * sum(pairs)
    return linear + attention + 2 * shape.head_params


def dense_prefill_flops(shape: ModelShape, n: int) -> int:
    """Floating-point operations of full causal attention's prefill of n tokens."""
    rows, pairs = [n] * shape.layers, [causal_pairs(n)] * shape.layers
    return prefill_flops(shape, rows, rows, pairs)


def decode_bytes(weights_bytes: int, kv_read_bytes: int) -> int:
    """Bytes that a decode step has to read.

    Args:
        weights_bytes: of every layer's weights and the logits' matrix (`Engine.decode_weight_bytes`). The embedding
            table is not among them, since a step reads one row of it; where it is tied it counts as logits' matrix.
        kv_read_bytes: keys, values and metadata that the step reads in all layers (`Method.decode_bytes`): what is
            resident for a method that attends to everything it keeps, pages and bounds for one that does not.
    """
    return weights_bytes + kv_read_bytes


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best, through this PyTorch.

    Attributes:
        gemm_flops: FLOP/s of a large matrix product.
        copy_bytes_per_s: bytes read plus bytes written, a second, by a large copy on the device.
        device: the processor's name. dtype: of the matrix product ("bfloat16").
        torch: its version. threads: that PyTorch computes with on the CPU; 0 on CUDA.
        host_bytes_per_s: bytes a second of a large copy from pinned memory of the host; 0 on a CPU, and where that has
            not been measured.
        gemm_flops_sustained: the same after a second of nothing else: a device may not keep its best rate up (an H200
            reaches its power limit), and a long prefill cannot be faster than this. Fractions are of the best rate.
        quiet: while measuring, the threads had the processor for themselves at least four fifths of the time. Where
            not, the figures are too low; they are measured anew, and may rise, the next time they are asked for.
    """

    gemm_flops: float
    copy_bytes_per_s: float
    device: str
    dtype: str
    torch: str
    threads: int
    quiet: bool
    gemm_flops_sustained: float = 0.0
    host_bytes_per_s: float = 0.0


NO_CEILINGS = Ceilings(math.inf, math.inf, device="", dtype="", torch="", threads=0, quiet=False)
"""Nothing is known, and nothing said: whatever is done takes no time at best."""


@dataclass(frozen=True)
class Fractions:
    """Floor times in seconds, and floor over measured time: 1 is perfect, null where nothing was measured.

    `prefill_lasting_floor_s` is the prefill's at the rate that products keep up (`Ceilings.gemm_flops_sustained`).
    `decode_bus_floor_s` is of what a step brings over the host link, which may go on beside what it reads on the
    device: no step is faster than the longer of both floors.

    A fraction above 1 says that the ceilings were measured on a busy machine; `measure_ceilings` raises them.
    """

    prefill_floor_s: float
    prefill_lasting_floor_s: float | None
    prefill: float | None
    decode_floor_s: float
    decode: float | None
    decode_bus_floor_s: float | None = None


def fractions(
    ceilings: Ceilings,
    flops: int,
    weights_bytes: int,
    kv_read_bytes: int,
    ttft_s: float | None,
    tpot_s: float | None,
    bus_bytes: float | None = None,
) -> Fractions:
    """How close a request came to the roofline.

    Args:
        ceilings: of the model's device and dtype.
        flops: of the prefill, as done (`prefill_flops`).
        weights_bytes, kv_read_bytes: see `decode_bytes`.
        ttft_s, tpot_s: measured seconds; None where there are none.
        bus_bytes: that a decode step brings over the host link; None where there is none.
    """
    # A prefill of few rows is bound by reading the weights, too.
    read = weights_bytes / ceilings.copy_bytes_per_s
    prefill = max(flops / ceilings.gemm_flops, read)
    sustained = ceilings.gemm_flops_sustained
    lasting = max(flops / sustained, read) if sustained else None
    decode = decode_bytes(weights_bytes, kv_read_bytes) / ceilings.copy_bytes_per_s
    link = ceilings.host_bytes_per_s
    bus = bus_bytes / link if bus_bytes is not None and link else None
    return Fractions(prefill, lasting, _share(prefill, ttft_s), decode, _share(decode, tpot_s), bus)


def _share(floor: float, measured: float | None) -> float | None:
    return floor / measured if measured else None


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The device's ceilings, measured the first time they are asked for and remembered: some seconds once."""
    known = _remembered(device, dtype)
    whole = known is not None and known.quiet and (device.type == "cpu" or known.host_bytes_per_s > 0)
    return known if known and whole else measure_ceilings(device, dtype)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures now, on an otherwise idle machine, and remembers the better of this time and the last.

    Interruptions only ever make a run slower, so the highest value that was ever reached is the nearest to the truth.
    """
    known = _remembered(device, dtype)
    wall, processor = time.perf_counter(), time.process_time()
    flops, lasting = _gemm_flops(device, dtype)
    busy_s, free_s = time.process_time() - processor, _threads(device) * (time.perf_counter() - wall)
    found = Ceilings(
        gemm_flops=max(flops, known.gemm_flops if known else 0.0),
        copy_bytes_per_s=max(_copy_rate(device), known.copy_bytes_per_s if known else 0.0),
        device=_name(device),
        dtype=_dtype_name(dtype),
        torch=torch.__version__,
        threads=_threads(device),
        quiet=busy_s >= _QUIET * free_s,
        gemm_flops_sustained=lasting,
        host_bytes_per_s=max(_host_rate(device), known.host_bytes_per_s if known else 0.0),
    )
    write_note(cache_dir() / FOLDER / _file(device, dtype), json.dumps(asdict(found)))
    return found


def measure_defaults() -> Ceilings:
    """Measures the device and dtype that a run takes where the user names none."""
    device = resolve_device("auto")
    return measure_ceilings(device, resolve_dtype("auto", device))


def remembered_ceilings() -> list[Ceilings]:
    """Everything measured so far by this user on any device, by device, dtype and version."""
    folder = cache_dir() / FOLDER
    found = [_read(path.name) for path in folder.glob("*.json")] if folder.is_dir() else []
    return sorted((one for one in found if one), key=lambda one: (one.device, one.dtype, one.torch, one.threads))


def _remembered(device: torch.device, dtype: torch.dtype) -> Ceilings | None:
    return _read(_file(device, dtype))


def _read(file: str) -> Ceilings | None:
    try:
        return Ceilings(**json.loads((cache_dir() / FOLDER / file).read_text()))
    except (OSError, ValueError, TypeError):
        # Missing, torn, or of another version of this file: measured again.
        return None


def _file(device: torch.device, dtype: torch.dtype) -> str:
    key = [_name(device), _dtype_name(dtype), torch.__version__, _threads(device)]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] + ".json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model() or "cpu"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _threads(device: torch.device) -> int:
    return 0 if device.type == "cuda" else torch.get_num_threads()


def _gemm_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """2 n^3 over the best and over the lasting time of an n x n product."""
    n = _SIDE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best, lasting = (clock(device, lambda: torch.mm(a, b, out=out)) for clock in (_best, _lasting))
    return 2 * n**3 / best, 2 * n**3 / lasting


def _copy_rate(device: torch.device) -> float:
    """Twice the buffer over the best time of copying it."""
    nbytes = _COPIED[device.type]
    if device.type == "cuda":
        nbytes = min(nbytes, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _best(device, lambda: target.copy_(source))


def _host_rate(device: torch.device) -> float:
    """256 MiB of pinned host memory over the best time of copying them to the device; 0 on a CPU."""
    if device.type == "cpu":
        return 0.0
    source = torch.ones(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.nbytes / _best(device, lambda: target.copy_(source, non_blocking=True))


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest run, after one that does not count."""
    work()
    return min(_times(device, work))


def _lasting(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of a run in the middle of the second half of many."""
    times = list(_times(device, work))
    return statistics.median(times[len(times) // 2 :])


def _times(device: torch.device, work: Callable[[], object]) -> Iterator[float]:
    end, runs = time.perf_counter() + _SECONDS, 0
    while runs < _LEAST_RUNS or time.perf_counter() < end:
        yield _seconds_on_cuda(work) if device.type == "cuda" else _seconds(work)
        runs += 1


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _seconds_on_cuda(work: Callable[[], object]) -> float:
    cuda: Any = torch.cuda
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
