"""RetrievalAttention (Liu et al., arXiv 2409.10516): decode searches the middle of the context in host memory.

The prefill is dense. Of the prompt, the first and the last tokens stay on the device, and all that follow; the keys and
values between them lie on the host, in an index for each KV head. For every new token, each query head attends to what
is on the device and to the keys of the index that match it best. Both softmaxes are joined by their denominators, so
the result is exact attention to the union.

`index` says how the host searches:
- `exact` multiplies with all keys as they lie there, in their precision, and has no index beside them;
- `flat`, `ivf` and `hnsw` are faiss's (`methods.common.key_index`), which holds keys in float32.

What is found is weighed by its product with the query, which the search has made.

Interpretations:
- the authors' public code searches a flat index by default, and has one of cells (512, of which 150 are looked into).
  The paper's own graph, which the prompt's queries shape since they are distributed otherwise than the keys, is not
  here: `recall` of `ivf` and `hnsw` says what it costs to build an index from keys alone;
- building an index counts in TTFT: the first token waits for it;
- a question behind the prompt comes in token by token;
- host memory also holds the tokens that stay on the device, which is a copy of a few hundred;
- the device attends to its part while the host searches; what a step then waits for is the search.

Recall is that of the first decode steps. It is found when the answer is there, so no clock sees it.
"""

from __future__ import annotations

import math
import time
from statistics import mean
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import embedding_bag

from harness.engine.attention import Attention, joined
from harness.engine.cache import LayerCache
from harness.engine.method import Method
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.engine.streams import brought, sent
from harness.options import Budget, OptionSet, budget_tokens, window_tokens
from methods.common import key_index
from methods.common.offloading import Offloading

_SAMPLED = 4
"""Decode steps whose searches are looked at afterwards."""

Count = Annotated[int, Field(ge=1)]


class Searched(NamedTuple):
    """A search to be looked at: of a layer, by queries [heads, d], and what it found, [heads, count]."""

    layer: int
    queries: Tensor
    found: Tensor


class Retrieval(Offloading):
    """Keeps everything, the middle of it on the host, where it is searched."""

    name = "retrieval"
    summary = "RetrievalAttention: decode attends to both ends and to what it finds of the middle, in host memory"
    nothing = MappingProxyType({"recent": "1"})
    counted = "attended"
    heads_apart = True

    class Options(OptionSet):
        """What stays on the device, how much is found, and how."""

        sinks: Annotated[int, Field(ge=0)] = Field(128, description="first tokens on the device; authors' code: 128")
        recent: Budget = Field(512, description="last prompt tokens on the device; authors' code: 512")
        topk: Budget = Field(2000, description="tokens that each query head finds; authors' code: 2000")
        index: Literal["exact", "flat", "ivf", "hnsw"] = Field(
            "exact", description="how it finds them; all but exact need faiss-cpu"
        )
        nlist: Count = Field(512, description="ivf: cells; authors' code: 512")
        nprobe: Count = Field(150, description="ivf: cells that a query looks into; authors' code: 150")
        m: Annotated[int, Field(ge=2)] = Field(32, description="hnsw: links of a key")
        ef: Count = Field(2000, description="hnsw: candidates on the way, topk at least")

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` where the index is not installed."""
        assert isinstance(options, cls.Options)
        if options.index != "exact":
            key_index.check_faiss(f"{cls.name}: index={options.index}")

    def host_layers(self) -> range:
        """All."""
        return range(self.model.shape.layers)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Says which tokens are to be searched, if any."""
        super().begin(prompt_len, max_new_tokens)
        recent = window_tokens(self.options.recent, prompt_len, prompt_len + max_new_tokens)
        self._far = slice(self.options.sinks, max(self.options.sinks, prompt_len - recent))
        self._count = min(budget_tokens(self.options.topk, prompt_len), self._far.stop - self._far.start)
        self._near = [LayerCache(cache.spare, cache.most) for cache in self.cache]
        self._forget_index()
        if not self._count:
            for store in self.stores.values():
                store.release()

    def asked_share(self, prompt_len: int) -> float:
        """Both ends, and what is found of the middle."""
        near = self.options.sinks + budget_tokens(self.options.recent, prompt_len)
        return min(1.0, (near + budget_tokens(self.options.topk, prompt_len)) / prompt_len)

    def _forget_index(self) -> None:
        self._indexes: list[list[key_index.KeyIndex]] = []
        self._asked: dict[int, Tensor] = {}
        self._searched: list[Searched] = []
        self._build_s = 0.0

    def end(self) -> None:
        """Frees what is on the device, and the index, too."""
        super().end()
        self._forget_index()
        for near in self._near:
            near.reset()

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Dense in the prefill, which sends keys and values to the host; then searches for every token."""
        if not self._count:
            return Method.attend(self, layer, heads, step)
        if step.phase == "decode":
            return torch.cat([self._decode(layer, row) for row in heads.single()])
        out = super().attend(layer, heads, step)
        near = (torch.cat((x[: self._far.start], x[self._far.stop :])) for x in (heads.k, heads.v, heads.positions))
        self._near[layer].append(*near)
        if self._indexed():
            self._asked[layer] = heads.q[-1].clone()
        return out

    def _indexed(self) -> bool:
        """Whether there is something to be searched, and an index for it."""
        return self.options.index != "exact" and 0 < self._count < self._far.stop - self._far.start

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """As in the base; at the end of the prefill the index is built."""
        rows = super().after_layer(layer, rows, heads, step)
        if self._indexed() and step.phase == "prefill" and layer == len(self.cache) - 1:
            with self.model.part("index"):
                self._build()
        return rows

    def _build(self) -> None:
        # Waits for the keys of all layers, which the device has been asked to wait for.
        self._asked = dict(enumerate(sent(torch.stack(list(self._asked.values())))()))
        options, began = self.options, time.perf_counter()
        assert options.index != "exact"
        recipe = key_index.Recipe(options.index, options.nlist, options.nprobe, options.m, options.ef)
        self._indexes = key_index.build([cache.keys[self._far] for cache in self.cache], recipe)
        self._build_s = time.perf_counter() - began

    def _decode(self, layer: int, row: Heads) -> Tensor:
        near = self._near[layer]
        near.append(row.k, row.v, row.positions)
        arrived = sent(row.q)
        # The device has its part to do before the host begins to wait for the queries, and to search.
        one = (x.unsqueeze(0) for x in (row.q, near.keys, near.values))
        out, norm = self.model.attention.normalised(*one, causal=False)
        found = brought(torch.cat(self._retrieved(layer, arrived()[0]), 1), row.q.device).unsqueeze(0)
        whole, _ = joined([(out[0], norm[0]), (found[..., :-1], found[..., -1])])
        return whole.reshape(1, -1)

    def _retrieved(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """The host's part for queries [heads, d]: as `weighed`."""
        keys, values = self.cache[layer].keys[self._far], self.cache[layer].values[self._far]
        if self._count == len(keys):
            return all_weighed(q, keys, values)
        products, found = self._found(layer, q, keys)
        return weighed(products / math.sqrt(q.shape[1]), values, found)

    def _found(self, layer: int, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not self._indexes:
            return best_keys(q, keys, self._count)
        products, found = key_index.search(self._indexes[layer], q, self._count)
        if len(self._searched) < _SAMPLED * len(self.cache):
            self._searched.append(Searched(layer, q.clone(), found))
        return products, found

    def replay(self) -> Replay | None:
        """Only where nothing is searched: the host takes part in every other step."""
        return None if self._count else self.dense_replay

    def kv_bytes(self) -> int:
        """Bytes of both ends and of new tokens."""
        return sum(near.nbytes for near in self._near) if self._count else Method.kv_bytes(self)

    def kv_bytes_host(self) -> int:
        """Bytes of the others, and of what finds them."""
        return super().kv_bytes_host() + self._index_bytes()

    def _index_bytes(self) -> int:
        return sum(index.outside_nbytes for indexes in self._indexes for index in indexes)

    def extra_bytes(self) -> int:
        """As in the base, and of the queries that say how an index searches."""
        queries = [*self._asked.values(), *(search.queries for search in self._searched)]
        return super().extra_bytes() + sum(each.nbytes for each in queries)

    @property
    def apart(self) -> bool:
        """Whether the device's memory is not the host's."""
        return self._near[0].keys.is_cuda

    def decode_bytes(self) -> int:
        """What is on the device. Where that is the host, also what is searched and found, for queries like the last."""
        if not self._count:
            return super().decode_bytes()
        own = sum(near.resident_nbytes for near in self._near)
        if self.apart:
            return own  # the host reads its part at its own rate
        searches = [Searched(layer, queries, queries) for layer, queries in self._asked.items()]
        return own + self._compared_bytes(searches) + self._found_bytes()

    def bus_bytes(self) -> int:
        """Of what comes back of the host's part of attention: each head's output and denominator, float32."""
        if not self._count:
            return 0
        ends = self.prompt_len - (self._far.stop - self._far.start)
        steps = sum(near.length - ends for near in self._near)
        return steps * self.model.shape.heads * (self.model.shape.head_dim + 1) * 4

    def _compared_bytes(self, searches: list[Searched]) -> int:
        """Bytes of keys that the searches of one step read, one in each layer; of several steps the mean."""
        if not self._indexes:
            return sum(cache.keys[self._far].nbytes for cache in self.cache)
        each = [key_index.compared(self._indexes[layer], queries, self._count) for layer, queries, _ in searches]
        return round(sum(each) * len(self.cache) / max(1, len(each))) * self.model.shape.head_dim * 4

    def _found_bytes(self) -> int:
        values = self.cache[0].values
        return len(self.cache) * self._count * self.model.shape.heads * values.shape[2] * values.element_size()

    def notes(self) -> dict[str, Any]:
        """Bytes of keys that a step searches; of an index, what it takes and how many of the best keys it finds."""
        if not self._count:
            return {}
        searched = {"searched_bytes": self._compared_bytes(self._searched)}
        if not self._indexes:
            return searched
        built = {"index_bytes": self._index_bytes(), "index_build_s": round(self._build_s, 6)}
        return searched | built | ({"recall": self._recall()} if self._searched else {})

    def _recall(self) -> float:
        each = (
            key_index.recall(found, queries, self.cache[layer].keys[self._far])
            for layer, queries, found in self._searched
        )
        return round(mean(each), 4)


def best_keys(q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` keys that match each query head best, and how well; each key is read once, in its own precision.

    Args:
        q: [heads, d]. k: [n, kv_heads, d], tokens of a KV head together.
        count: up to n.

    Returns:
        q k, [heads, count] float32, and the keys' indices, [heads, count] int64.
    """
    # Keys on the left are multiplied as they lie. On the right they are packed first, and so they are in batches of few
    # queries each: two to six times as long.
    each = zip(k.unbind(1), q.view(k.shape[1], -1, q.shape[1]), strict=True)
    best = torch.cat([(keys @ queries.T).T for keys, queries in each]).float().topk(count, sorted=False)
    return best.values, best.indices


def weighed(logits: Tensor, v: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one token to some of the values, and what it takes to join it with that to others.

    Values are added up where they lie.

    Args:
        logits: [heads, m] float32.
        v: [n, kv_heads, d].
        found: whose logits they are, [heads, m] int64; negative for none.

    Returns:
        [heads, d] float32, and the log of each softmax's denominator, [heads, 1] float32: minus infinity where a head
        has found nothing.
    """
    heads, m = found.shape
    norms = logits.masked_fill_(found < 0, -torch.inf).logsumexp(1, keepdim=True)
    weights = (logits - norms.clamp(min=torch.finfo(torch.float32).min)).exp().to(v.dtype)
    rows, between_tokens, between_heads = as_rows(v)
    own = torch.arange(heads).unsqueeze(1) // (heads // v.shape[1])
    index = found.clamp(min=0) * between_tokens + own * between_heads
    bags = torch.arange(0, heads * m, m)
    out = embedding_bag(index.view(-1), rows, bags, mode="sum", per_sample_weights=weights.view(-1))
    return out.float(), norms


def as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """Keys or values [n, kv_heads, d] as rows [.., d]; how many rows it is from a token, and from a head, to the next.

    Nothing is copied, so rows may also hold what lies between.
    """
    n, heads, d = x.shape
    token, head = x.stride(0) // d, x.stride(1) // d
    return x.as_strided(((n - 1) * token + (heads - 1) * head + 1, d), (d, 1)), token, head


def all_weighed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `weighed`, of queries [heads, d] to all keys and values, [n, kv_heads, d]."""
    queries = q.view(1, k.shape[1], -1, q.shape[1]).transpose(1, 2)  # a KV head's query heads are so many queries of it
    out, norms = Attention().normalised(queries, k.unsqueeze(0), v.unsqueeze(0), causal=False)
    return out[0].transpose(0, 1).reshape(q.shape).float(), norms[0].T.reshape(-1, 1)
