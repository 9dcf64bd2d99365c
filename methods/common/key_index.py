"""Indexes of keys in host memory, which find those whose inner product with a query is highest, by faiss.

A KV head of a layer has one, built from its keys alone. Queries are distributed otherwise than keys (Liu et al., arXiv
2409.10516, section 3), so an approximate index has to look at more of them than it would for queries like keys; how
many of the best it finds is to be measured (`recall`).

Threads build an index each, so a graph is the same in every run, and search for a query head each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from harness.errors import MissingPackage

Result = TypeVar("Result")


@dataclass(frozen=True)
class Recipe:
    """Which index.

    Attributes:
        kind: "flat" compares a query with every key; "ivf" with the keys of the cells nearest to it (Jegou et al.,
            2011); "hnsw" with those on its way through a graph (Malkov and Yashunin, arXiv 1603.09320).
        cells, probed: of "ivf", how many there are and how many a query looks into; at most as many as keys.
        links, breadth: of "hnsw", neighbours of a key in the upper levels of the graph, twice that in the lowest, and
            candidates kept on the way; no fewer than are to be found.
    """

    kind: Literal["flat", "ivf", "hnsw"]
    cells: int = 512
    probed: int = 150
    links: int = 32
    breadth: int = 2000


class KeyIndex:
    """The index of one KV head.

    Attributes:
        outside_nbytes: bytes that it takes, in memory that is not PyTorch's.
    """

    def __init__(self, keys: Tensor, recipe: Recipe) -> None:
        """
        Args:
            keys: [n, d] on the CPU, n at least 1; kept as float32.
            recipe: of which kind.
        """
        self._faiss, self._recipe, (self._keys, self._channels) = _faiss(), recipe, keys.shape
        self._index = {"flat": self._flat, "ivf": self._ivf, "hnsw": self._hnsw}[recipe.kind]()
        vectors = keys.float().contiguous().numpy()
        if not self._index.is_trained:
            self._index.train(vectors)
        self._index.add(vectors)
        self.outside_nbytes = self._nbytes()

    def search(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The keys that match each query best, the best first.

        Args:
            queries: [m, d] on the CPU.
            count: up to n.

        Returns:
            Their products with it, [m, count] float32, and their indices, [m, count] int64; -1 behind what was found.
        """
        if self._recipe.kind == "hnsw":
            self._index.hnsw.efSearch = max(self._recipe.breadth, count)
        products, found = self._index.search(queries.float().numpy(), count)
        return torch.from_numpy(products), torch.from_numpy(found)

    def compared(self, queries: Tensor, count: int) -> int:
        """With how many vectors such a search compares the queries. Not while another one is under way."""
        if self._recipe.kind == "flat":
            return len(queries) * self._keys
        ivf = self._recipe.kind == "ivf"
        statistics = self._faiss.cvar.indexIVF_stats if ivf else self._faiss.cvar.hnsw_stats
        statistics.reset()
        self.search(queries, count)
        return int(statistics.ndis) + len(queries) * (self._index.nlist if ivf else 0)

    def _flat(self) -> Any:
        return self._faiss.IndexFlatIP(self._channels)

    def _ivf(self) -> Any:
        cells, product = min(self._recipe.cells, self._keys), self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.IndexIVFFlat(self._flat(), self._channels, cells, product)
        index.nprobe, index.cp.min_points_per_centroid = min(self._recipe.probed, cells), 1
        return index

    def _hnsw(self) -> Any:
        return self._faiss.IndexHNSWFlat(self._channels, self._recipe.links, self._faiss.METRIC_INNER_PRODUCT)

    def _nbytes(self) -> int:
        nbytes = self._keys * self._channels * 4
        if self._recipe.kind == "ivf":
            nbytes += self._index.nlist * self._channels * 4 + self._keys * 8
        if self._recipe.kind == "hnsw":
            graph = self._index.hnsw
            nbytes += graph.neighbors.size() * 4 + graph.offsets.size() * 8 + graph.levels.size() * 4
        return nbytes


def check_faiss(name: str) -> None:
    """Raises `InputError` where faiss is not installed; `name` is what asks for it."""
    if find_spec("faiss") is None:
        raise MissingPackage(f"{name} needs faiss, which is not installed: pip install faiss-cpu")


def build(layers: Iterable[Tensor], recipe: Recipe) -> list[list[KeyIndex]]:
    """Indexes of keys, [n, kv_heads, d] of each layer: one for each layer and KV head."""
    each = [keys.unbind(1) for keys in layers]
    flat = iter(_beside(lambda keys: KeyIndex(keys, recipe), [keys for heads in each for keys in heads]))
    return [[next(flat) for _ in heads] for heads in each]


def search(indexes: Sequence[KeyIndex], q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The keys that match each query head best, among those of its KV head.

    Args:
        indexes: one for each KV head of a layer.
        q: [heads, d] on the CPU.
        count: how many.

    Returns:
        Their products with it, [heads, count] float32, and indices, [heads, count] int64; -1 behind what was found.
    """
    each = zip(indexes, _of_each(q, len(indexes)), strict=True)
    pairs = [(index, query) for index, queries in each for query in queries.split(1)]
    products, found = zip(*_beside(lambda pair: pair[0].search(pair[1], count), pairs), strict=True)
    return torch.cat(products), torch.cat(found)


def compared(indexes: Sequence[KeyIndex], q: Tensor, count: int) -> int:
    """With how many vectors `search` compares the queries."""
    each = zip(indexes, _of_each(q, len(indexes)), strict=True)
    return sum(index.compared(own, count) for index, own in each)


def recall(found: Tensor, q: Tensor, k: Tensor) -> float:
    """Share of the best keys of each query head that were found, mean over heads.

    Args:
        found: [heads, count] int64; -1 for none.
        q: [heads, d]. k: [n, kv_heads, d].
    """
    count, hits = found.shape[1], 0
    for keys, queries, own in zip(k.unbind(1), _of_each(q, k.shape[1]), _of_each(found, k.shape[1]), strict=True):
        products = queries.float() @ keys.float().T
        # What lies behind the last key stands for nothing that was found.
        best = torch.zeros(len(own), len(k) + 1, dtype=torch.bool).scatter_(1, products.topk(count).indices, True)
        hits += int(best.gather(1, own.where(own >= 0, len(k))).sum())
    return hits / found.numel()


def _of_each(x: Tensor, indexes: int) -> Tensor:
    """Rows of query heads, [heads, m], by the index that answers them: [indexes, heads of each, m]."""
    return x.view(indexes, -1, x.shape[1])


def _beside(work: Callable[[Any], Result], items: Sequence[Any]) -> list[Result]:
    return list(_threads(torch.get_num_threads()).map(work, items))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, initializer=lambda: _faiss().omp_set_num_threads(1))


def _faiss() -> Any:
    return import_module("faiss")
