"""The interface of a pruning method. The base class *is* full attention.

The engine runs a decoder layer as three verbs (project, attend, feed forward) and calls a method at four points:

    begin            once a request, before its first layer
    attend           instead of the layer's attention, in prefill and in decode
    after_attention  before the feed forward: rows dropped here skip it
    after_layer      between layers: rows may be dropped or brought back

Where prompts are short and launching kernels takes longest, another may take the place of `attend` in the prefill:

    settle           behind several layers: what is kept of all their keys and values

A method is created once for a model and begins anew with every request, so nothing may survive `begin`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.cache import LayerCache
from harness.engine.parallel import ALONE, Ranks
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.engine.stopwatch import Stopwatch
from harness.errors import InputError
from harness.options import OptionSet

Hook = Literal["attend", "after_attention", "after_layer"]
"""Where a method may act in a layer."""

HOOKS: tuple[Hook, ...] = get_args(Hook)
"""In the order in which they are called."""

Counted = Literal["kept", "attended"]
"""Prompt tokens that are kept, or those of them that a decode step attends to."""

FirstLayers = Callable[[Tensor, int], Heads]
"""(token ids [n], layer) -> what that layer projects from them under full attention."""


Encode = Callable[[str], Sequence[int]]
"""Text -> its token ids, without special ones."""


def no_tokenizer(text: str) -> Sequence[int]:
    """The `Encode` of a model without a tokenizer: no ids."""
    return ()


def causal_pairs(n: int) -> int:
    """Query-key pairs of causal attention over n tokens: n (n + 1) / 2."""
    return n * (n + 1) // 2


@dataclass(frozen=True)
class ModelContext:
    """What a method may know of the model it works in.

    Attributes:
        shape: the model's numbers; where it is spread over ranks, those of this rank's part.
        attention: the attention kernel that every method of a run shares.
        move: (x [n, heads, d], by [n]) -> queries or keys x as if so many positions further on, or back.
        out_weight: layer -> the weight of its output projection, [hidden, heads * head_dim].
        encode: the model's tokenizer.
        stopwatch: times the parts of a prefill.
        ranks: through which goes what is reduced over the heads of a layer, or chosen among them.
        undivided: the whole model's numbers, where `shape` is of a part.
    """

    shape: ModelShape
    attention: Attention
    move: Callable[[Tensor, Tensor], Tensor]
    out_weight: Callable[[int], Tensor]
    encode: Encode = no_tokenizer
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    ranks: Ranks = ALONE
    undivided: ModelShape | None = None

    @property
    def whole(self) -> ModelShape:
        """The whole model's numbers, whatever it is spread over."""
        return self.undivided or self.shape

    def part(self, name: str) -> AbstractContextManager[None]:
        """Work inside counts as part `name` of TTFT: "score", "select", "gather"."""
        return self.stopwatch.part(name)


class Method:
    """Full attention; override a hook to prune.

    Attributes:
        name, summary: how the command line lists the method.
        simulated: it masks instead of skipping work, so its latency and memory mean nothing and are not reported.
        reorders: its caches need not hold tokens at ascending original positions.
        nothing: options with which it prunes nothing, so that it must equal full attention.
        parallel: it has been shown to choose alike on all ranks that a model is spread over (`ModelContext.ranks`); no
            subclass inherits that.
        cache: one `LayerCache` a layer, of the current request.
        prompt_len: tokens of the current prompt.
        dense_replay: decodes as full attention does, see `replay`.
        counted: what its budget counts, tokens kept, or of all that are kept those that a decode step attends to.
        takes_sparse: in its prefill, rows attend to each other through `causal` alone.
        sparse: the method whose `causal` stands for its own, if there is one: a sparse prefill of what it keeps.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    simulated: ClassVar[bool] = False
    reorders: ClassVar[bool] = False
    nothing: ClassVar[Mapping[str, str]] = {}
    counted: ClassVar[Counted] = "kept"
    takes_sparse: ClassVar[bool] = False
    parallel: ClassVar[bool] = False

    class Options(OptionSet):
        """No options."""

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """
        Raises:
            InputError: the options do not fit the model (a layer it does not have).
        """
        self.options, self.model = options, model
        self.dense_replay = Replay()
        self.sparse: Method | None = None
        self.check(options, model.whole)

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` where the options do not fit the model; called before its weights load."""

    @classmethod
    def check_batch(cls, options: OptionSet) -> None:
        """Raises `InputError` where requests cannot be decoded together; called before the model's weights load.

        They can where a decode step brings in the new token's row and no other.
        """

    @classmethod
    def check_parallel(cls) -> None:
        """Raises `InputError` where the method is not for several ranks; called before the model's weights load."""
        if not vars(cls).get("parallel", False):
            raise InputError(f"{cls.name} has not been shown to choose alike on several devices")

    def prompt(self, ids: Tensor, run: FirstLayers) -> Tensor:
        """The token ids, [m], that the model is to see of the prompt `ids`, [n]; positions count from 0 in them.

        Args:
            ids: [n] int64.
            run: takes a pass of its own through the model's first layers; it counts in TTFT and in the prefill's work.
        """
        return ids

    def question_tokens(self, prompt_len: int, question: int) -> int:
        """Last prompt tokens that come in one by one as decode steps although they belong to the prompt.

        Args:
            prompt_len: tokens of the prompt.
            question: tokens of its question, 0 if that is not known.
        """
        return 0

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the last request and makes room for the next.

        Args:
            prompt_len: tokens that the prefill brings in.
            max_new_tokens: most tokens that will follow (generated ones, a question's if that comes later, and those of
                all further turns of a conversation).
        """
        self.prompt_len = prompt_len
        most = prompt_len + max_new_tokens
        self.cache = [LayerCache(max_new_tokens, most) for _ in range(self.model.shape.layers)]
        if self.sparse is not None:
            self.sparse.begin(prompt_len, max_new_tokens)

    def end(self) -> None:
        """Frees the request's keys and values, so that they do not count in another method's peak memory."""
        for cache in self.cache:
            cache.reset()

    def probes(self, ids: Tensor) -> Iterable[Tensor]:
        """Token ids, [m] each, that the model reads behind the prompt once it is in, to learn from how it does.

        Each goes through all layers as a step of phase "probe", in which `attend` is to store nothing. It counts in
        TTFT and in the prefill's work. The last one over, the iterator ends: the place to act on what was learned.

        Args:
            ids: [n] int64, what the prefill brought in.
        """
        return ()

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Stores the rows' keys and values and attends.

        Returns:
            [n, heads * head_dim], one row for each query.
        """
        cache = self.cache[layer]
        cache.append(heads.k, heads.v, heads.positions)
        return self.causal(layer, heads) if step.phase == "prefill" else cache.attend(self.model.attention, heads.q)

    def held_queries(self) -> int | None:
        """How many of a layer's last queries `settle` is shown; None where the method always attends by itself.

        A method whose prefill attends to everything, and then chooses which keys and values it keeps, may choose for
        many layers at once. Where prompts are short and there is memory for all of these, `settle` is called then, and
        `attend` is not.
        """
        return None

    def settle(self, layers: range, heads: Heads) -> None:
        """Stores what is kept of layers that attended to everything; see `held_queries`.

        Args:
            layers: which.
            heads: what they have projected, side by side: keys and values of [n, layers * kv_heads, head_dim], and the
                last queries, [held, layers * heads, head_dim].
        """

    def causal(self, layer: int, heads: Heads) -> Tensor:
        """Attention of a prefill's rows to each other, [n, heads * head_dim]: all of it, or what `sparse` does."""
        if self.sparse is not None:
            return self.sparse.causal(layer, heads)
        return self.model.attention.causal(heads.q, heads.k, heads.v)

    def after_attention(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """The rows that go on to this layer's feed forward (they carry `attended`)."""
        return rows

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """The rows that go on to the next layer. `heads` is what this layer projected before any row was dropped."""
        return rows

    def prefill_hooks(self, layer: int) -> Collection[Hook]:
        """Which hooks do anything in the prefill at this layer that full attention does not do.

        What lies between them is replayed in short prefills, and no other hook is called there. A class that overrides
        a hook is taken to act through it at every layer, unless it overrides this as well.
        """
        return [hook for hook in HOOKS if self._overrides(hook)]

    def _overrides(self, hook: Hook) -> bool:
        names = (hook, "causal") if hook == "attend" else (hook,)
        own = any(getattr(type(self), name) is not getattr(Method, name) for name in names)
        return own or (hook == "attend" and self.sparse is not None)

    def replay(self) -> Replay | None:
        """What does the decode steps that follow when they are recorded and replayed; None where they cannot be.

        Asked behind the prefill, or a later step, by an engine that can replay: the place to prepare for it. A method
        whose decode attends to all that its caches hold, and changes nothing else, returns `self.dense_replay`.
        """
        return None

    # What the method reports of the current request.

    def tokens_requested(self) -> list[int]:
        """Prompt tokens a layer that the options ask for; the whole prompt where nothing is pruned."""
        return [self.prompt_len] * self.model.shape.layers

    def asked_share(self, prompt_len: int) -> float:
        """The share of a prompt of this length that its options come to, said before there is one; begins a request.

        Mean over layers and KV heads, of what `counted` says: `harness study` matches methods by it. Here what
        `tokens_requested` asks for; override where that is known only behind a prompt, or is not what is counted.
        """
        self.begin(prompt_len, 1)
        return sum(self.tokens_requested()) / (prompt_len * self.model.shape.layers)

    def tokens_kept(self) -> Sequence[float]:
        """Prompt tokens a layer whose keys and values are really there, mean over KV heads."""
        return [cache.tokens_before(self.prompt_len) for cache in self.cache]

    def kv_bytes(self) -> int:
        """Bytes allocated on the device for keys and values, the reserve for new tokens included."""
        return sum(cache.nbytes for cache in self.cache)

    def decode_bytes(self) -> int:
        """Bytes of keys, values and method data that the next decode step has to read: what is resident."""
        return sum(cache.resident_nbytes for cache in self.cache)

    def bus_bytes(self) -> int:
        """Bytes of keys and values that decode steps have brought over the host link so far in this request."""
        return 0

    def prefill_pairs(self, rows: int) -> int:
        """Query-key pairs that a layer's prefill of `rows` rows attends to: all that causal attention has."""
        return causal_pairs(rows) if self.sparse is None else self.sparse.prefill_pairs(rows)

    def kv_bytes_host(self) -> int:
        """Bytes of keys and values kept in host memory apart from the device."""
        return 0

    def extra_bytes(self) -> int:
        """Bytes of what else the method keeps on the device (hidden states, page metadata)."""
        return 0

    def notes(self) -> dict[str, Any]:
        """What else of the current request belongs in its record, as JSON values."""
        return {}

    def tokens_recomputed(self) -> int:
        """Prompt tokens times layers that decode had to compute because the prefill dropped them."""
        return 0


def acting_hooks(method: Method) -> list[Collection[Hook]]:
    """The hooks that a prefill must call at each layer: those of `Method.prefill_hooks`."""
    layers = method.model.shape.layers
    # Whoever overrides a hook anew is not whom an older `prefill_hooks` speaks of.
    told = {*HOOKS, "causal", "prefill_hooks"}
    latest = next(kind for kind in type(method).__mro__ if vars(kind).keys() & told)
    if latest is not Method and "prefill_hooks" in vars(latest) and method.sparse is None:
        return [method.prefill_hooks(layer) for layer in range(layers)]
    return [Method.prefill_hooks(method, 0)] * layers  # the same at all


def held_queries(method: Method) -> int | None:
    """Those of `Method.held_queries`, of a method whose `settle` does what its `attend` does in the prefill."""
    # Whoever overrides `attend` anew is not whom an older `settle` stands for.
    told = {"attend", "causal", "settle"}
    latest = next(kind for kind in type(method).__mro__ if vars(kind).keys() & told)
    return method.held_queries() if "settle" in vars(latest) and method.sparse is None else None


def alike(acting: Sequence[Collection[Hook]], layer: int) -> range:
    """A layer, and those behind it up to the next that may drop rows."""
    behind = range(layer, len(acting))
    return range(layer, next((each for each in behind if set(acting[each]) - {"attend"}), behind[-1]) + 1)
