"""What a request's memory is made of: a ledger of measured bytes, in a pass of its own.

Two witnesses that know nothing of each other are set side by side. The method reports what it keeps (`kv_bytes`,
`kv_bytes_host`, `extra_bytes`). `TensorMemory` watches every operator and counts the bytes of the storages that are
alive, whoever holds them. What the second finds and the first does not name is `unexplained`, and the ledger says which
functions made it. Watching slows every operator down, so nothing is timed in this pass.

With every method some of it is the engine's own: original positions (8 bytes a token in a layer's cache), the prompt's
rotary angles until the first decode step (2 * head_dim elements a row, once for all layers) and the last row's logits.
Beside the keys and values of a long prompt that is about 1 %; of a short one, or of a small window, it may be more.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request

TOLERANCE = 0.02
"""Share of a request's memory that may stay unexplained without a reason."""

# They hand a tensor over that was made outside the dispatcher (`torch.tensor`, `torch.from_numpy`): it is new.
_BIRTHS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default, torch.ops.aten.lift_fresh_copy.default}


@dataclass
class _Storage:
    nbytes: int
    device: str
    site: str
    end: Any


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensor storages that operators create while this context is open, freed ones subtracted.

    A storage counts once and whole, from the operator that returns it to the end of its last tensor; views and in-place
    operators add nothing, and operators that PyTorch composes of others are followed inside. Storages that existed
    before do not count unless they are given. Not seen: memory that a kernel takes and gives back before it returns.
    When the outermost `with` ends, the figures stop where they are.
    """

    def __init__(self, baseline: Iterable[Tensor] = ()) -> None:
        """
        Args:
            baseline: tensors whose storages count as if they had been created inside.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, _Storage] = {}
        self._live: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._simple = {torch.ops.prim.device.default}
        self._depth = 0
        for tensor in baseline:
            self._count(tensor, "baseline")

    def current(self, device: str = "cpu") -> int:
        """Bytes alive now on devices of that type ("cpu", "cuda")."""
        return self._live[device]

    def peak(self, device: str = "cpu") -> int:
        """Most bytes alive at once on devices of that type since the start or the last `reset_peak`."""
        return self._peak[device]

    def reset_peak(self) -> None:
        """The peak starts again from what is alive now."""
        self._peak = Counter(self._live)

    def sites(self, device: str = "cpu", without: Iterable[Tensor] = ()) -> dict[str, int]:
        """Bytes alive now by the function that created them ("harness.engine.cache:_grown"), largest first.

        Args:
            device: type of the devices.
            without: tensors whose storages are left out.
        """
        skipped = {_key(tensor) for tensor in without}
        found: Counter[str] = Counter()
        for key, storage in self._storages.items():
            if storage.device == device and storage.nbytes and key not in skipped:
                found[storage.site] += storage.nbytes
        return dict(found.most_common())

    def __enter__(self) -> Self:
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            # Weights outlive this object; without this they would keep it, and every storage's entry, for good.
            for storage in self._storages.values():
                storage.end.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator and counts what it made."""
        kwargs = kwargs or {}
        if func not in self._simple:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._simple.add(func)
        if func not in _BIRTHS:
            for tensor in _tensors((args, tuple(kwargs.values()))):
                self._ignore(tensor)
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        site = _site() if made else ""
        for tensor in made:
            self._count(tensor, site)
        return result

    def _ignore(self, tensor: Tensor) -> None:
        """An operand that is not known was there before; what shares its storage is not new either."""
        if _key(tensor) not in self._storages:
            self._add(tensor, 0, "")

    def _count(self, tensor: Tensor, site: str) -> None:
        known = self._storages.get(_key(tensor))
        nbytes = tensor.untyped_storage().nbytes()
        if known is None:
            self._add(tensor, nbytes, site)
        elif known.site:
            self._change(known, nbytes)

    def _add(self, tensor: Tensor, nbytes: int, site: str) -> None:
        key = _key(tensor)
        # PyTorch keeps the Python object of a storage for as long as the storage itself.
        end = weakref.finalize(tensor.untyped_storage(), self._freed, key)
        end.atexit = False
        self._storages[key] = _Storage(0, tensor.device.type, site, end)
        self._change(self._storages[key], nbytes)

    def _change(self, storage: _Storage, nbytes: int) -> None:
        device = storage.device
        self._live[device] += nbytes - storage.nbytes
        storage.nbytes = nbytes
        self._peak[device] = max(self._peak[device], self._live[device])

    def _freed(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._live[storage.device] -= storage.nbytes


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with memory among an operator's arguments or results; it knows no other containers than these."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided and value.device.type != "meta":
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _key(tensor: Tensor) -> int:
    # The address of PyTorch's own storage object: unique while the storage lives, and `_freed` forgets it in time.
    return int(tensor.untyped_storage()._cdata)


def _site() -> str:
    """The innermost function outside PyTorch, transformers and this module, as "module:function"."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] not in ("torch", "transformers", "contextlib"):
            return f"{module}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"


def model_bytes(*modules: nn.Module) -> int:
    """Bytes of the storages behind all parameters and buffers, each once: tied weights count once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class AllocatorPeak:
    """The CUDA caching allocator's own count from the creation of this object on; elsewhere every answer is None."""

    def __init__(self, device: torch.device) -> None:
        """Resets the peak of `device`."""
        self._device = device if device.type == "cuda" else None
        self._before = 0
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int | None:
        """Highest bytes allocated since, all that was there before included."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device)

    def peak_growth(self) -> int | None:
        """Highest bytes allocated since, beyond those that were there before."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device) - self._before

    def growth(self) -> int | None:
        """Bytes allocated now, beyond those that were there before."""
        return None if self._device is None else torch.cuda.memory_allocated(self._device) - self._before


@dataclass(frozen=True)
class Ledger:
    """What one request's memory is made of, in bytes on the model's device where nothing else is said.

    Attributes:
        weights: parameters and buffers of the model.
        activation_peak: most that the prefill held beyond weights and what stays after it.
        kv_after_prefill, kv_steady: keys and values after the prefill and after the last token; the method's report.
        kv_host: keys and values in host memory after the last token; the method's report.
        extra, extra_steady: what else the method keeps, after the prefill and after the last token; its report.
        total_after_prefill, total_steady: weights and every tensor of the request that is alive, found by
            `TensorMemory`; where the device is the CPU, host memory included.
        allocator_after_prefill, allocator_peak: the same and the prefill's highest, by the CUDA allocator: growth since
            before the request plus weights, so that other methods' caches do not count; null elsewhere.
        unexplained: total_after_prefill - (weights + keys and values + extra).
        unexplained_steady: the same of total_steady.
        unexplained_share: unexplained as a share of what the request holds, total_after_prefill - weights: a share of
            the total would look small beside any model's weights. 0 where the request holds nothing.
        reason: what is unexplained beyond `TOLERANCE`, after the prefill, after the last token or between the
            allocator and the tensors, and which code made it; null if nothing is.
    """

    weights: int
    activation_peak: int
    kv_after_prefill: int
    kv_steady: int
    kv_host: int
    extra: int
    extra_steady: int
    total_after_prefill: int
    total_steady: int
    allocator_after_prefill: int | None
    allocator_peak: int | None
    unexplained: int
    unexplained_steady: int
    unexplained_share: float
    reason: str | None


@dataclass(frozen=True)
class _Moment:
    """Both witnesses at one moment; `live` is without weights, `sites` without keys and values in the caches."""

    kv: int
    host: int
    extra: int
    live: int
    on_cpu: bool
    sites: dict[str, int]

    @property
    def unexplained(self) -> int:
        return self.live - (self.kv + self.extra + (self.host if self.on_cpu else 0))

    @property
    def share(self) -> float:
        return self.unexplained / self.live if self.live else 0.0


def ledger(engine: Engine, method: Method, request: Request) -> Ledger:
    """Runs one request under watch and accounts for its memory.

    Leave it to run to the end: the method serves this request and forgets the one before.
    """
    device = request.prompt.device
    _forget(engine, method, request)
    allocator, tensors = AllocatorPeak(device), TensorMemory()
    with tensors:
        # Replayed steps would be out of sight.
        stream = engine.stream(method, request, eager=True)
        next(stream)
        first, peak = _moment(tensors, method, device.type), tensors.peak(device.type)
        grown, highest = allocator.growth(), allocator.peak_growth()
        for _ in stream:
            pass
        last = _moment(tensors, method, device.type)
    weights = model_bytes(*_modules(engine))
    return Ledger(
        weights=weights,
        activation_peak=peak - first.live,
        kv_after_prefill=first.kv,
        kv_steady=last.kv,
        kv_host=last.host,
        extra=first.extra,
        extra_steady=last.extra,
        total_after_prefill=weights + first.live,
        total_steady=weights + last.live,
        allocator_after_prefill=None if grown is None else weights + grown,
        allocator_peak=None if highest is None else weights + highest,
        unexplained=first.unexplained,
        unexplained_steady=last.unexplained,
        unexplained_share=first.share,
        reason=_reason(first, last, grown),
    )


def _forget(engine: Engine, method: Method, request: Request) -> None:
    """Lets go of the last request: freed in the middle of this one, it would be seen by the allocator alone."""
    for _ in engine.stream(method, Request(request.prompt[:1], 1)):
        pass
    method.begin(1, 1)
    # Garbage in cycles would be freed at some moment of the pass, another one each time.
    gc.collect()


def _moment(tensors: TensorMemory, method: Method, device: str) -> _Moment:
    heads = [head for cache in method.cache for head in cache.heads()]
    cached = [tensor for head in heads for tensor in (head.keys, head.values)]
    return _Moment(
        kv=method.kv_bytes(),
        host=method.kv_bytes_host(),
        extra=method.extra_bytes(),
        live=tensors.current(device),
        on_cpu=device == "cpu",
        sites=tensors.sites(device, without=cached),
    )


def _modules(engine: Engine) -> tuple[nn.Module, ...]:
    return engine.embed, engine.layers, engine.norm, engine.lm_head


def _reason(first: _Moment, last: _Moment, grown: int | None) -> str | None:
    parts = []
    for when, moment in (("after the prefill", first), ("after the last token", last)):
        if abs(moment.share) > TOLERANCE:
            parts.append(f"{when} {moment.unexplained} bytes are not reported; beside caches: {_listed(moment.sites)}")
    if grown is not None and abs(grown - first.live) > TOLERANCE * first.live:
        parts.append(f"the allocator holds {grown - first.live} bytes beyond the tensors (rounding, workspaces)")
    return "; ".join(parts) or None


def _listed(sites: dict[str, int]) -> str:
    return ", ".join(f"{site} {nbytes}" for site, nbytes in list(sites.items())[:4]) or "nothing"
