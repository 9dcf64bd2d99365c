"""Watches a method from outside while it serves a request: the evidence that the conformance kit judges.

Tokens are followed by their positions through the hooks, caches are read after the prefill and at the end, and memory
is found by walking everything the method holds, so nothing here relies on what the method says of itself.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.engine import Engine
from harness.engine.method import Method, acting_hooks, alike, held_queries
from harness.engine.replay.places import Held
from harness.engine.request import Request
from harness.engine.step import Heads, Rows, Step


@dataclass(frozen=True)
class Memory:
    """Bytes that a method holds, each storage counted once and whole, however small a view of it is used.

    Attributes:
        resident: of the keys and values that its caches show now.
        caches: of the storages behind those.
        floats: of floating-point storages elsewhere: parked keys and values, hidden states, page metadata.
        others: of all other storages but the caches' positions: indices, masks.
        outside: of what objects of the method hold in memory that is not PyTorch's, as they say it (`outside_nbytes`).
    """

    resident: int
    caches: int
    floats: int
    others: int
    outside: int


@dataclass(frozen=True)
class State:
    """What a method holds and what it reports at one moment; lists have one entry a layer.

    Attributes:
        positions: of the cached tokens: for each KV head, or once where all heads hold the same.
        lengths: how many keys, and how many values, there are, likewise.
        requested, kept, kv_bytes, kv_bytes_host, extra_bytes, recomputed: the method's reports.
        memory: what was found.
    """

    positions: list[list[list[int]]]
    lengths: list[list[tuple[int, int]]]
    requested: list[int]
    kept: Sequence[float]
    kv_bytes: int
    kv_bytes_host: int
    extra_bytes: int
    recomputed: int
    memory: Memory


@dataclass(frozen=True)
class Trace:
    """One request as it was served.

    Attributes:
        prompt_len: tokens that the prefill brought in.
        length: tokens that the model saw, those of decode included.
        tokens: generated ids.
        prefilled: when the first token was out. finished: after the last.
        logits: of every step, [vocab]; left out when traces are compared.
        displaced: where a position stood for another token than its own; "" if nowhere.
        lost: the first layer that the prompt's last row did not reach; None if it reached all.
    """

    prompt_len: int
    length: int
    tokens: list[int]
    prefilled: State
    finished: State
    displaced: str
    lost: int | None
    logits: list[Tensor] = field(compare=False)

    @property
    def finite(self) -> bool:
        """No logit was infinite or not a number."""
        return all(bool(logits.isfinite().all()) for logits in self.logits)

    def states(self) -> list[tuple[str, State]]:
        """Both states, named."""
        return [("after the prefill", self.prefilled), ("after decode", self.finished)]


class Session:
    """One instance of a method that serves request after request."""

    def __init__(self, method: Method, engine: Engine) -> None:
        """
        Args:
            method: fresh; its hooks are wrapped. engine: on the model that the method was built for.
        """
        self.method, self.engine, self._watch = method, copy.copy(engine), _Watch()
        hooks = [(method, name) for name in ("attend", "after_attention", "after_layer")]
        for owner, name in [*hooks, (self.engine, "logits")]:
            setattr(owner, name, getattr(self._watch, name)(getattr(owner, name)))

    def serve(self, ids: Tensor, new_tokens: int, stop_ids: frozenset[int] = frozenset()) -> Trace:
        """Serves one request; ids: [n] int64."""
        watch, method = self._watch, self.method
        watch.begin()
        stream = self.engine.stream(method, Request(ids, new_tokens, stop_ids))
        tokens = [next(stream)]
        watch.look_at(method)
        prefilled = state(method)
        tokens += stream
        watch.look_at(method)
        found = watch.displaced, watch.lost, watch.steps
        return Trace(method.prompt_len, watch.length, tokens, prefilled, state(method), *found)


def settled(method: Method, engine: Engine, ids: Tensor) -> list[list[list[int]]]:
    """Positions that layers hold which are settled at once, from the first up to one where rows may be dropped.

    None of them of a method that does not settle; else as `State.positions`.
    """
    ids = method.prompt(ids, engine.first_layers)
    method.begin(len(ids), 1)
    queries, shape, layers = held_queries(method), engine.context.shape, alike(acting_hooks(method), 0)
    if queries is None:
        return []
    each = [engine.first_layers(ids, layer) for layer in layers]
    held = Held(layers, shape, each[0].positions, queries, each[0].k[:0])
    for layer, heads in zip(layers, each, strict=True):
        held.append(layer, heads)
    method.settle(layers, held.heads)
    return [[positions.tolist() for positions in cache.kept_positions()] for cache in method.cache[: layers.stop]]


class _Watch:
    """Remembers which values belong to which position, and compares."""

    def begin(self) -> None:
        self.displaced, self.length = "", 0
        self.lost: int | None = None
        self.steps: list[Tensor] = []
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def logits(self, original: Callable[[Rows], Tensor]) -> Callable[[Rows], Tensor]:
        def watched(rows: Rows) -> Tensor:
            out = original(rows)
            self.steps.append(out)
            return out

        return watched

    def attend(self, original: Callable[[int, Heads, Step], Tensor]) -> Callable[[int, Heads, Step], Tensor]:
        def watched(layer: int, heads: Heads, step: Step) -> Tensor:
            if step.phase == "probe":  # of which nothing is to stay
                return original(layer, heads, step)
            self.length = max(self.length, step.start + step.count)
            if self.lost is None and int(heads.positions[-1]) != step.start + step.count - 1:
                self.lost = layer
            self._seen.setdefault(layer, []).append((heads.positions.clone(), heads.v.clone()))
            return original(layer, heads, step)

        return watched

    def after_attention(self, original: Callable[..., Rows]) -> Callable[..., Rows]:
        return self._rows_hook("after_attention", original)

    def after_layer(self, original: Callable[..., Rows]) -> Callable[..., Rows]:
        return self._rows_hook("after_layer", original)

    def _rows_hook(self, name: str, original: Callable[..., Rows]) -> Callable[..., Rows]:
        def watched(layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
            out = original(layer, rows, heads, step)
            if not _same_tokens(rows, out):
                self._note(f"{name} of layer {layer} ({step.phase}) gave a position another token's hidden state")
            return out

        return watched

    def look_at(self, method: Method) -> None:
        """Are the values in the caches those that the model projected for the tokens at these positions?"""
        for layer, cache in enumerate(method.cache):
            positions, values = (torch.cat(parts) for parts in zip(*self._seen[layer], strict=True))
            known = values.new_full((int(positions.max()) + 1, *values.shape[1:]), torch.nan)
            known[positions] = values
            for head, held in enumerate(cache.heads()):
                expected = known[held.positions.clamp(0, len(known) - 1), head]
                # Loose enough for a cache of fewer bits.
                same = held.values.shape == expected.shape and held.values.allclose(
                    expected, 0.05, 0.05, equal_nan=True
                )
                if not same:
                    self._note(f"the cache of layer {layer} holds a position with another token's values")

    def _note(self, text: str) -> None:
        self.displaced = self.displaced or text


def _same_tokens(before: Rows, after: Rows) -> bool:
    """Whether every position that went in came out with its own hidden state, or not at all."""
    if after is before:
        return True
    place = {position: row for row, position in enumerate(before.positions.tolist())}
    pairs = [(place[position], row) for row, position in enumerate(after.positions.tolist()) if position in place]
    old, new = [row for row, _ in pairs], [row for _, row in pairs]
    return before.hidden[old].allclose(after.hidden[new], rtol=0, atol=0, equal_nan=True)


def state(method: Method) -> State:
    """What the method holds and reports now."""
    return State(
        positions=[[held.tolist() for held in cache.kept_positions()] for cache in method.cache],
        lengths=[_lengths(cache) for cache in method.cache],
        requested=method.tokens_requested(),
        kept=method.tokens_kept(),
        kv_bytes=method.kv_bytes(),
        kv_bytes_host=method.kv_bytes_host(),
        extra_bytes=method.extra_bytes(),
        recomputed=method.tokens_recomputed(),
        memory=memory(method),
    )


def _lengths(cache: LayerCache) -> list[tuple[int, int]]:
    entries = len(cache.kept_positions())
    return [(len(head.keys), len(head.values)) for head in cache.heads()[:entries]] or [(0, 0)] * entries


def memory(method: Method) -> Memory:
    """Bytes of every tensor that the method can reach, the model's own left out."""
    heads = [head for cache in method.cache for head in cache.heads()]
    shown = [tensor for head in heads for tensor in (head.keys, head.values)]
    caches, positions = _storages(shown), _storages([head.positions for head in heads])
    seen: set[int] = set()
    models = _storages(_held(method.model, seen)[0])
    held, outside = _held(method, seen)
    known = caches | positions | models
    floats = _without(_storages(tensor for tensor in held if tensor.is_floating_point()), known)
    others = _without(_storages(held), known | floats)
    in_caches, in_floats, in_others = (sum(part.values()) for part in (caches, floats, others))
    return Memory(sum(tensor.nbytes for tensor in shown), in_caches, in_floats, in_others, outside)


def _storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the storages behind some tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _without(storages: dict[int, int], known: dict[int, int]) -> dict[int, int]:
    return {address: size for address, size in storages.items() if address not in known}


def _held(thing: Any, seen: set[int]) -> tuple[list[Tensor], int]:
    """Tensors reachable from there, and bytes that other objects hold outside of PyTorch."""
    found = list(_reachable(thing, seen))
    tensors = [each for each in found if isinstance(each, Tensor)]
    return tensors, sum(int(each.outside_nbytes) for each in found if not isinstance(each, Tensor))


def _reachable(thing: Any, seen: set[int]) -> Iterator[Any]:
    """What holds memory, through attributes and containers; what is in `seen` is not entered again."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor) or hasattr(thing, "outside_nbytes"):
        yield thing
        return
    for part in _parts(thing):
        yield from _reachable(part, seen)


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, Mapping):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return list(thing)
    if isinstance(thing, (type, ModuleType)):
        return []
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(thing, name)]
    return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name) for name in slots)]
