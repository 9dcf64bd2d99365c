"""The staged forward pass: own prefill and decode loops over the layers of a stock transformers model.

A prompt's prefill is bound by arithmetic (every weight meets every row), a decode step by memory traffic (all weights
and the resident keys and values are read for one row). Pruning rows therefore shortens the first, and pruning keys and
values the second. The engine runs three verbs a layer (project, attend, feed forward) and lets a method act at the
hooks of `harness.engine.method.Method`; it knows no method by name, and the base class gives exactly the stock model's
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from harness.engine import promises
from harness.engine.attention import Attention, pick_attention
from harness.engine.fused import FusedVerbs, why_not_fused
from harness.engine.generation import Generation, Work
from harness.engine.method import Encode, Method, ModelContext, acting_hooks, alike, held_queries, no_tokenizer
from harness.engine.parallel import ALONE, Ranks
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.places import Caches, Nowhere
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.recorded_prefill import Passage, RecordedPrefill
from harness.engine.replay.replay import Replay
from harness.engine.request import Request
from harness.engine.shape import ModelShape, sliding_window
from harness.engine.step import Heads, Rows, Step
from harness.engine.verbs import Verbs
from harness.errors import InputError


class Engine:
    """Runs requests through a model under a method, one request at a time, greedily."""

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        attention: Attention | None = None,
        kind: str = "stock",
        encode: Encode = no_tokenizer,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            model: a `*ForCausalLM` of one of the supported families, in eval mode.
            shape: the whole model's.
            attention: the kernel that all methods share.
            kind: "stock" (the model's own modules), "fused" (`harness.engine.fused`) or "graphed" (fused, and decode
                steps replayed from CUDA graphs where a method allows it). The weights of a model that was fused stay
                joined.
            encode: as `ModelContext.encode`.
            ranks: that hold the rest of the model, where it is one rank's part.
        """
        body, own = model.model, ranks.part(shape)
        self.layers, self.embed, self.norm, self.lm_head = body.layers, body.embed_tokens, body.norm, model.lm_head
        self.kind, self.window = kind, sliding_window(model.config)
        self.verbs = (Verbs if kind == "stock" else FusedVerbs)(model, own, ranks)
        tied = model.lm_head.weight is body.embed_tokens.weight
        self.decode_weight_bytes = sum(p.nbytes for p in model.parameters()) - (0 if tied else self.embed.weight.nbytes)
        kernel = attention or Attention()
        self.context = ModelContext(
            own, kernel, self.verbs.rotary.move, self.verbs.out_weight, encode, ranks=ranks, undivided=shape
        )
        self.table = DecodeTable(own, self.embed.weight.device) if kind == "graphed" else None
        self.prefill = RecordedPrefill(self.verbs, kernel, own, self.embed.weight) if kind == "graphed" else None
        self._steps: WeakKeyDictionary[Replay, RecordedDecode] = WeakKeyDictionary()

    def stream(self, method: Method, request: Request, *, eager: bool = False) -> Generation:
        """Generates greedily, up to a stop token or as many tokens as are asked for.

        Args:
            method: which tokens are kept.
            request: what is asked.
            eager: launch every kernel anew, even where it could be replayed.
        """
        work = Work(eager=eager)
        read = partial(self.read, method, request, work)
        return Generation(self._tokens(read, method, request, work), work)

    def go_on(self, method: Method, request: Request, position: int, *, eager: bool = False) -> Generation:
        """As `stream`, over what the caches hold: the request's prompt comes in behind it, as decode rows.

        Args:
            method: that has served what came before.
            request: of the tokens alone that come in now; none of them is pruned.
            position: of the first of them.
            eager: as `stream` takes it.
        """
        work = Work(eager=eager)
        read = partial(self._read_on, method, request, position)
        return Generation(self._tokens(read, method, request, work), work)

    @torch.inference_mode()
    def _tokens(
        self, read: Callable[[], tuple[Tensor, int]], method: Method, request: Request, work: Work
    ) -> Generator[int]:
        logits, position = read()
        work.start = position
        token, count = _greedy(logits, request.suppressed(1)), 1
        yield (out := int(token))
        while out not in request.stop_ids and count < request.max_new_tokens:
            left = request.max_new_tokens - count
            if (
                not work.eager
                and count >= request.min_new_tokens
                and (replay := self._replay(method, left)) is not None
            ):
                work.recorded = self._recorded(replay)
                yield from work.recorded.tokens(replay, method.cache, token, position, left, request.stop_ids)
                return
            logits = self.forward(method, token, Step("decode", position, 1))
            position, count = position + 1, count + 1
            token = _greedy(logits, request.suppressed(count))
            yield (out := int(token))

    def _replay(self, method: Method, count: int) -> Replay | None:
        """What replays the method's steps, if they may be replayed and its caches have room for `count` tokens."""
        if self.table is None or not all(cache.length > 0 for cache in method.cache):
            return None
        replay = promises.replay(method.replay())
        # Behind a cut room is made in every step, for as many as come.
        ahead = method.cache[: replay.cuts[0] if replay is not None and replay.cuts else None]
        return replay if all(cache.room >= count for cache in ahead) else None

    def _recorded(self, replay: Replay) -> RecordedDecode:
        if replay not in self._steps:
            assert self.table is not None
            self._steps[replay] = RecordedDecode(self.embed, self.verbs, self.table, replay.cuts)
        return self._steps[replay]

    def read(self, method: Method, request: Request, work: Work | None = None) -> tuple[Tensor, int]:
        """Takes in prompt and question; returns the last row's logits and the next token's position.

        Args:
            method: begins anew.
            request: what is asked.
            work: is told what the prefill computes.

        Raises:
            InputError: prompt and answer, or what a method probes with, exceed the model's sliding window.
            BrokenPromise: a hook of the method returned what the engine cannot go on with.
        """
        self._check_window(len(request.prompt) + request.to_come)
        work, late = work or Work(), request.late_tokens(method)
        context, question = request.prompt.tensor_split([len(request.prompt) - late])
        context = promises.prompt_ids(method.prompt(context, partial(self.first_layers, work=work)), context)
        method.begin(len(context), late + request.to_come)
        promises.caches(getattr(method, "cache", None), len(self.layers))
        logits, position = self.forward(method, context, Step("prefill", 0, len(context)), work), len(context)
        for more in method.probes(context):
            self._check_window(position + len(more))
            self._through(method, more, Step("probe", position, len(more)), work)
        for piece in (question,) if request.question_after else question.unsqueeze(1):
            logits = self.forward(method, piece, Step("decode", position, len(piece)))
            position += len(piece)
        return logits, position

    def _read_on(self, method: Method, request: Request, position: int) -> tuple[Tensor, int]:
        count = len(request.prompt)
        return self.forward(method, request.prompt, Step("decode", position, count)), position + count

    def _check_window(self, tokens: int) -> None:
        # Attention here sees all that is kept: beyond the window it would differ from the model's own.
        if self.window is not None and tokens > self.window:
            raise InputError(f"{tokens} tokens, new ones included, exceed the model's sliding window of {self.window}")

    def first_layers(self, ids: Tensor, layer: int, work: Work | None = None) -> Heads:
        """What `layer` projects from `ids`, [n], under full attention; nothing is kept.

        Args:
            ids: [n] int64.
            layer: whose queries, keys and values are wanted.
            work: is told how many rows each layer computed.
        """
        work = work or Work()
        rows = Rows(self.embed(ids), torch.arange(len(ids), device=ids.device))
        work.projected += [len(ids)] * (layer + 1)
        work.fed += [len(ids)] * layer + [0]
        work.past += [0] * (layer + 1)
        if self.prefill is not None and not (work.eager or self.context.stopwatch.running):
            captures, work.prefill = self.prefill.captures, self.prefill
            heads = Passage(self.prefill, rows, Nowhere()).reach(layer, "attend")
            work.captures += self.prefill.captures - captures
            return heads
        for each in range(layer):
            heads = self.verbs.project(each, rows)
            attended = self.context.attention.causal(heads.q, heads.k, heads.v)
            rows = self.verbs.feed_forward(each, rows.with_attended(attended))
        return self.verbs.project(layer, rows)

    @torch.inference_mode()
    def forward(self, method: Method, ids: Tensor, step: Step, work: Work | None = None) -> Tensor:
        """Brings `step.count` tokens in, behind those that the method's caches hold.

        Args:
            ids: [step.count] int64.
            work: is told how many rows each layer computed.

        Returns:
            Logits of the last row, [vocab].

        Raises:
            BrokenPromise: a hook of the method returned what the engine cannot go on with.
        """
        return self.logits(self._through(method, ids, step, work or Work()))

    def _through(self, method: Method, ids: Tensor, step: Step, work: Work) -> Rows:
        """What is left of the rows behind the last layer."""
        positions = torch.arange(step.start, step.start + step.count, device=ids.device)
        rows = Rows(self.embed(ids), positions)
        # Parts are timed hook by hook.
        if self.prefill is not None and step.phase == "prefill" and not (work.eager or self.context.stopwatch.running):
            return self._from_hook_to_hook(self.prefill, method, rows, step, work)
        for layer in range(len(self.layers)):
            rows = self._layer(method, layer, rows, step, work)
        return rows

    def _from_hook_to_hook(self, prefill: RecordedPrefill, method: Method, rows: Rows, step: Step, work: Work) -> Rows:
        """The same, where only those hooks are called through which the method acts."""
        captures, work.prefill = prefill.captures, prefill
        way, acting = Passage(prefill, rows, Caches(method.cache)), acting_hooks(method)
        queries = held_queries(method)
        for layer, hooks in enumerate(acting):
            work.projected.append(len(way.rows))
            work.past.append(step.start)
            if queries is not None and not way.holds(layer):
                way.hold(alike(acting, layer), queries)
            if "attend" in hooks and not way.holds(layer):
                heads = way.reach(layer, "attend")
                way.attended(promises.attended(method.attend(layer, heads, step), layer, heads))
            if "after_attention" in hooks:
                heads = way.reach(layer, "after_attention")
                left = method.after_attention(layer, way.rows, heads, step)
                way.rows = promises.rows("after_attention", left, layer, way.rows)
            work.fed.append(len(way.rows))
            if "after_layer" in hooks:
                heads = way.reach(layer, "after_layer")
                left = method.after_layer(layer, way.rows, heads, step)
                way.rows = promises.rows("after_layer", left, layer, way.rows)
            if (held := way.let_go(layer)) is not None:
                method.settle(*held)
        rows = way.finish(len(self.layers))
        work.captures += prefill.captures - captures
        return rows

    def _layer(self, method: Method, layer: int, rows: Rows, step: Step, work: Work) -> Rows:
        part = self.context.part
        work.projected.append(len(rows))
        work.past.append(step.start)
        with part("project"):
            heads = self.verbs.project(layer, rows)
        with part("attention"):
            rows = rows.with_attended(promises.attended(method.attend(layer, heads, step), layer, heads))
        rows = promises.rows("after_attention", method.after_attention(layer, rows, heads, step), layer, rows)
        work.fed.append(len(rows))
        with part("feed forward"):
            rows = self.verbs.feed_forward(layer, rows)
        return promises.rows("after_layer", method.after_layer(layer, rows, heads, step), layer, rows)

    def logits(self, rows: Rows) -> Tensor:
        """Logits of the last row alone, [vocab]."""
        return self.verbs.logits(rows)


def _greedy(logits: Tensor, suppressed: frozenset[int]) -> Tensor:
    if suppressed:
        logits = logits.clone()
        logits[list(suppressed)] = -torch.inf
    return logits.argmax().unsqueeze(0)


def build_engine(
    model: Any,
    shape: ModelShape,
    attention: str = "auto",
    kind: str = "auto",
    encode: Encode = no_tokenizer,
    ranks: Ranks = ALONE,
) -> Engine:
    """The engine that a user asks for by names: the fastest that works here, or exactly what is named.

    Args:
        model, shape: as `Engine` takes them.
        attention: a name in `harness.engine.attention.KERNELS`, or "auto".
        kind: as `Engine` takes it, or "auto": graphed where the fused kernels run, else stock.
        encode, ranks: as `Engine` takes them.

    Raises:
        InputError: what is named does not run here.
    """
    weight, own = model.lm_head.weight, ranks.part(shape)
    kernel = pick_attention(attention, own, weight.device, weight.dtype)
    reason = why_not_fused(model, own) if kind != "stock" else ""
    if reason and kind != "auto":
        raise InputError(f"--engine {kind} does not run here: {reason}")
    return Engine(model, shape, kernel, "stock" if reason else kind.replace("auto", "graphed"), encode, ranks)
