"""The staged forward pass: own prefill and decode loops over the layers of a stock transformers model.

A prompt's prefill is bound by arithmetic (every weight meets every row), a decode step by memory traffic (all weights
and the resident keys and values are read for one row). Pruning rows therefore shortens the first, and pruning keys and
values the second. The engine runs three verbs a layer (project, attend, feed forward) and lets a method act at the
hooks of `harness.engine.method.Method`; it knows no method by name, and the base class gives exactly the stock model's
logits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from harness.engine.attention import Attention, pick_attention
from harness.engine.fused import FusedVerbs, why_not_fused
from harness.engine.method import Method, ModelContext
from harness.engine.replay.decode_table import ResidentCaches
from harness.engine.replay.graphs import GraphedDecode, StepParts
from harness.engine.shape import ModelShape
from harness.engine.step import Rows, Step
from harness.engine.stopwatch import part
from harness.engine.verbs import Verbs
from harness.errors import InputError


@dataclass(frozen=True)
class Request:
    """What one generation is asked to do.

    Attributes:
        prompt: [n] int64 token ids on the model's device, n >= 1.
        max_new_tokens: where generation stops at the latest, >= 1.
        stop_ids: tokens that end generation (they are part of the output).
        min_new_tokens: stop tokens are suppressed before this many tokens are out.
        question: last tokens of the prompt that hold the question; 0 if that is not known.
        question_after: prefill, and prune, the context alone; the question follows in one step and is never pruned.
    """

    prompt: Tensor
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    question: int = 0
    question_after: bool = False

    def __post_init__(self) -> None:
        if self.prompt.numel() < 1:
            raise ValueError("the prompt is empty")
        if not 0 <= self.question < self.prompt.numel():
            raise ValueError(f"a question of {self.question} tokens leaves no context")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def suppressed(self, number: int) -> frozenset[int]:
        """Tokens that may not be the `number`-th new one, counted from 1."""
        return self.stop_ids if number <= self.min_new_tokens else frozenset()

    def late_tokens(self, method: Method) -> int:
        """Last tokens of the prompt that follow the prefill: its question, if protocol or method want that."""
        if self.question_after:
            return self.question
        return method.question_tokens(len(self.prompt), self.question)


@dataclass(frozen=True)
class Work:
    """How many rows each layer of the last prefill really computed, for cost formulas.

    Attributes:
        projected: rows a layer that went through norm and q/k/v.
        fed: rows a layer that went through output projection and MLP.
    """

    projected: list[int]
    fed: list[int]


class Engine:
    """Runs requests through a model under a method, one request at a time, greedily."""

    def __init__(self, model: Any, shape: ModelShape, attention: Attention | None = None, kind: str = "stock") -> None:
        """
        Args:
            model: a `*ForCausalLM` of one of the supported families, in eval mode. shape: its shape. attention: the
            kernel that all methods share. kind: "stock" (the model's own modules), "fused" (`harness.engine.fused`) or
            "graphed" (fused, and decode steps
                replayed from CUDA graphs where a method allows it). The weights of a model that was fused stay joined.
        """
        body = model.model
        self.layers, self.embed, self.norm, self.lm_head = body.layers, body.embed_tokens, body.norm, model.lm_head
        self.kind = kind
        self.verbs = (Verbs if kind == "stock" else FusedVerbs)(model, shape)
        self.work = Work([], [])
        tied = model.lm_head.weight is body.embed_tokens.weight
        self.decode_weight_bytes = sum(p.nbytes for p in model.parameters()) - (0 if tied else self.embed.weight.nbytes)
        self.context = ModelContext(shape, attention or Attention(), self.verbs.rotary.move)
        self._resident = ResidentCaches(shape, self.embed.weight.device) if kind == "graphed" else None
        self._graphs: WeakKeyDictionary[Method, GraphedDecode] = WeakKeyDictionary()
        self._replays: GraphedDecode | None = None

    @torch.inference_mode()
    def stream(self, method: Method, request: Request, *, eager: bool = False) -> Iterator[int]:
        """Generates greedily and yields each new token id once it is on the host.

        The first `next` is the prefill (TTFT), each later one a decode step (TPOT).

        Args:
            method: which tokens are kept.
            request: what is asked.
            eager: launch every decode step anew, even where it could be replayed.
        """
        with closing(self._tokens(method, request, eager)) as tokens:
            for count, token in enumerate(tokens, 1):
                yield token
                if token in request.stop_ids or count == request.max_new_tokens:
                    return

    def _tokens(self, method: Method, request: Request, eager: bool) -> Generator[int]:
        self._replays = None
        logits, position = self.read(method, request)
        token = _greedy(logits, request.suppressed(1))
        yield int(token)
        count, replayed = 1, not eager and self._can_replay(method, request.max_new_tokens)
        while count < request.max_new_tokens and not (replayed and count >= request.min_new_tokens):
            logits = self.forward(method, token, Step("decode", position, 1))
            position, count = position + 1, count + 1
            token = _greedy(logits, request.suppressed(count))
            yield int(token)
        if count < request.max_new_tokens:
            self._replays = self._graph(method)
            yield from self._replays.tokens(method, token, position, request.max_new_tokens - count)

    def _can_replay(self, method: Method, count: int) -> bool:
        return (
            self._resident is not None
            and method.static_decode()
            and all(cache.length > 0 and cache.room >= count - 1 for cache in method.cache)
        )

    def overlap(self) -> dict[str, float] | None:
        """`Overlap.read` of the last request's last decode step; None if nothing ran beside it."""
        return self._replays.overlap.read() if self._replays is not None and self._replays.overlap is not None else None

    def _graph(self, method: Method) -> GraphedDecode:
        if method not in self._graphs:
            assert self._resident is not None
            parts = self._step_parts(ref(method), self._resident)
            self._graphs[method] = GraphedDecode(parts, len(self.layers), method.cuts(), self._resident)
        return self._graphs[method]

    def _step_parts(self, method: ref[Method], resident: ResidentCaches) -> StepParts:
        """The step to record. It holds the method weakly, whose end is also its graph's."""

        def through(rows: Rows, layers: range, count: int, last: bool) -> Rows:
            alive = method()
            assert alive is not None
            step = Step("decode", -1, int(last), resident)
            if layers.start:
                rows = alive.enter(layers.start, rows, count, step)
            return self._through(alive, rows, step, layers)

        return StepParts(lambda token, position: Rows(self.embed(token), position), through, self.logits)

    def read(self, method: Method, request: Request) -> tuple[Tensor, int]:
        """Takes in prompt and question; returns the last row's logits and the next token's position."""
        late = request.late_tokens(method)
        context, question = request.prompt.tensor_split([len(request.prompt) - late])
        context = method.prompt(context)
        method.begin(len(context), late + request.max_new_tokens)
        logits, position = self.forward(method, context, Step("prefill", 0, len(context))), len(context)
        for piece in (question,) if request.question_after else question.unsqueeze(1):
            logits = self.forward(method, piece, Step("decode", position, len(piece)))
            position += len(piece)
        return logits, position

    @torch.inference_mode()
    def forward(self, method: Method, ids: Tensor, step: Step) -> Tensor:
        """Brings `step.count` tokens in, behind those that the method's caches hold.

        Args:
            ids: [step.count] int64.

        Returns:
            Logits of the last row, [vocab].
        """
        positions = torch.arange(step.start, step.start + step.count, device=ids.device)
        return self.logits(self._through(method, Rows(self.embed(ids), positions), step, range(len(self.layers))))

    def _through(self, method: Method, rows: Rows, step: Step, layers: range) -> Rows:
        work = Work([], [])
        for layer in layers:
            work.projected.append(len(rows))
            with part("project"):
                heads = self.verbs.project(layer, rows)
            with part("attention"):
                rows = rows.with_attended(method.attend(layer, heads, step))
            rows = method.after_attention(layer, rows, heads, step)
            work.fed.append(len(rows))
            with part("feed forward"):
                rows = self.verbs.feed_forward(layer, rows)
            rows = method.after_layer(layer, rows, heads, step)
        if step.phase == "prefill":
            self.work = work
        return rows

    def logits(self, rows: Rows) -> Tensor:
        """Logits of the last row alone, [vocab]."""
        return self.verbs.logits(rows)


def _greedy(logits: Tensor, suppressed: frozenset[int]) -> Tensor:
    if suppressed:
        logits = logits.clone()
        logits[list(suppressed)] = -torch.inf
    return logits.argmax().unsqueeze(0)


def build_engine(model: Any, shape: ModelShape, attention: str = "auto", kind: str = "auto") -> Engine:
    """The engine that a user asks for by names: the fastest that works here, or exactly what is named.

    Args:
        model, shape: as `Engine` takes them.
        attention: a name in `harness.engine.attention.KERNELS`, or "auto".
        kind: as `Engine` takes it, or "auto": graphed where the fused kernels run, else stock.

    Raises:
        InputError: what is named does not run here.
    """
    weight = model.lm_head.weight
    kernel = pick_attention(attention, shape, weight.device, weight.dtype)
    reason = why_not_fused(model, shape) if kind != "stock" else ""
    if reason and kind != "auto":
        raise InputError(f"--engine {kind} does not run here: {reason}")
    return Engine(model, shape, kernel, "stock" if reason else kind.replace("auto", "graphed"))
