"""The interface of a pruning method. The base class *is* full attention.

The engine runs a decoder layer as three verbs (project, attend, feed forward) and calls a method at four points:

    begin            once a request, before its first layer
    attend           instead of the layer's attention, in prefill and in decode
    after_attention  before the feed forward: rows dropped here skip it
    after_layer      between layers: rows may be dropped or brought back

A method is created once for a model and begins anew with every request, so nothing may survive `begin`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.cache import LayerCache
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.options import OptionSet

if TYPE_CHECKING:
    from harness.engine.replay.decode_table import ResidentCaches


def causal_pairs(n: int) -> int:
    """Query-key pairs of causal attention over n tokens: n (n + 1) / 2."""
    return n * (n + 1) // 2


@dataclass(frozen=True)
class ModelContext:
    """What a method may know of the model it works in.

    Attributes:
        shape: the model's numbers.
        attention: the attention kernel that every method of a run shares.
        move: (x [n, heads, d], by [n]) -> queries or keys x as if so many positions further on, or back.
    """

    shape: ModelShape
    attention: Attention
    move: Callable[[Tensor, Tensor], Tensor]


class Method:
    """Full attention; override a hook to prune.

    Attributes:
        name, summary: how the command line lists the method.
        simulated: it masks instead of skipping work, so its latency and memory mean nothing and are not reported.
        reorders: its caches need not hold tokens at ascending original positions.
        nothing: options with which it prunes nothing, so that it must equal full attention.
        cache: one `LayerCache` a layer, of the current request.
        prompt_len: tokens of the current prompt.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    simulated: ClassVar[bool] = False
    reorders: ClassVar[bool] = False
    nothing: ClassVar[Mapping[str, str]] = {}

    class Options(OptionSet):
        """No options."""

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """
        Raises:
            InputError: the options do not fit the model (a layer it does not have).
        """
        self.options, self.model = options, model
        self.check(options, model.shape)

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` where the options do not fit the model; called before its weights load."""

    def prompt(self, ids: Tensor) -> Tensor:
        """The token ids, [m], that the model is to see of the prompt `ids`, [n]; positions count from 0 in them."""
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
            max_new_tokens: most tokens that will follow (generated ones and a question's, if that comes later).
        """
        self.prompt_len = prompt_len
        most = prompt_len + max_new_tokens
        self.cache = [LayerCache(max_new_tokens, most) for _ in range(self.model.shape.layers)]

    def end(self) -> None:
        """Frees the request's keys and values, so that they do not count in another method's peak memory."""
        for cache in self.cache:
            cache.reset()

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Stores the rows' keys and values and attends.

        Returns:
            [n, heads * head_dim], one row for each query.
        """
        if step.resident is not None:
            return step.resident.attend(layer, heads)
        cache = self.cache[layer]
        cache.append(heads.k, heads.v, heads.positions)
        return self.model.attention.causal(heads.q, cache.keys, cache.values)

    def after_attention(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """The rows that go on to this layer's feed forward (they carry `attended`)."""
        return rows

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """The rows that go on to the next layer. `heads` is what this layer projected before any row was dropped."""
        return rows

    def static_decode(self) -> bool:
        """Whether all decode steps of this request do the same work on the device, whatever the tokens are.

        But for the number of rows behind its `cuts`.

        Asked once, after the prefill, by an engine that can replay steps: the place to prepare memory for them.
        Then the engine may record one of them and replay it: the hooks run once, with `step.resident`, and must neither
        wait for the device nor make shapes, or decisions of the host, that depend on what is in a tensor.
        """
        return False

    def cuts(self) -> tuple[int, ...]:
        """Layers before which a recorded step is cut, since how many rows go on there is known on the device alone.

        Behind a cut the newest token's row may be joined by others; see `arriving` and `enter`.
        """
        return ()

    def arriving(self, layer: int, resident: ResidentCaches) -> int:
        """How many rows, the newest token's included, a step that is replayed takes in at the cut before a layer.

        Asked once a step and cut, when all before it has been launched: the place to wait for the device, and to make
        room for the rows' keys and values.
        """
        return 1

    def enter(self, layer: int, rows: Rows, count: int, step: Step) -> Rows:
        """The rows that go on at the cut before a layer: `count` of those that arrive and are not through yet.

        Args:
            layer: the first behind the cut.
            rows: the newest token's.
            count: as many as the step is recorded for. Where `step.count` is 1 they are all that are left, the newest
                token's last, with padding ahead if that is fewer; where it is 0 the newest is not among them.
            step: a step that is being recorded.
        """
        return rows

    def ready_to_replay(self, *, rehearsal: bool) -> None:
        """Brings what the method has on the device up to the request, before its steps are replayed.

        Args:
            rehearsal: steps are about to run only to be recorded, and may do no harm.
        """

    def replayed(self, count: int, position: int) -> None:
        """Takes note of `count` steps, from `position` on, that were replayed: kernels have filled the caches."""
        for cache in self.cache:
            cache.extended(count, position)

    def rewind(self, resident: ResidentCaches) -> None:
        """Takes back what one decode step did to the method's own memory: it ran only to be recorded.

        Keys and values that it stored need no care, since the step runs again with the same token.
        """

    def capture_key(self) -> Hashable:
        """Changes with the addresses of the method's own tensors that a recorded decode step uses."""
        return None

    # What the method reports of the current request.

    def tokens_requested(self) -> list[int]:
        """Prompt tokens a layer that the options ask for; the whole prompt where nothing is pruned."""
        return [self.prompt_len] * self.model.shape.layers

    def tokens_kept(self) -> list[int]:
        """Prompt tokens a layer whose keys and values are really there."""
        return [int((cache.positions < self.prompt_len).sum()) for cache in self.cache]

    def kv_bytes(self) -> int:
        """Bytes allocated on the device for keys and values, the reserve for new tokens included."""
        return sum(cache.nbytes for cache in self.cache)

    def decode_bytes(self) -> int:
        """Bytes of keys, values and method data that the next decode step has to read: what is resident."""
        return sum(cache.resident_nbytes for cache in self.cache)

    def prefill_pairs(self, rows: int) -> int:
        """Query-key pairs that a layer's prefill of `rows` rows attends to: all that causal attention has."""
        return causal_pairs(rows)

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
