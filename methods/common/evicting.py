"""Methods that keep few keys and values of a dense prefill: score, choose, gather, for each layer and KV head.

How many (`budget`), which are worth most (`score`) and which of those stay (`choose`) are three questions, so a method
answers the one that its paper is about. What is dropped is never stored: a layer's cache is made of what stays. A
method that evicts in decode too asks the same questions again behind every new token.

Of a short prompt, asking takes longer than answering, so the questions are put once for many layers, whose heads stand
side by side as those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from harness.engine.method import Method
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Step
from harness.engine.streams import beside
from harness.errors import InputError
from harness.options import Budget, OptionSet, window_tokens
from methods.common.best import best_of
from methods.common.take import take, take_each


class Evicting(Method):
    """Dense attention in the prefill; each KV head then keeps the tokens that it rates highest.

    Attributes:
        stays: the option that counts the tokens which always stay, of the budget; "" if there is none.
    """

    nothing = MappingProxyType({"budget": "1"})
    stays: ClassVar[str] = ""
    takes_sparse = True

    class Options(OptionSet):
        """How much stays."""

        budget: Budget = Field(0.25, description="prompt tokens that each KV head keeps")

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for a budget in tokens below those which always stay."""
        assert isinstance(options, cls.Options)
        if isinstance(options.budget, int) and options.budget < (count := always(cls, options)):
            raise InputError(f"{cls.name}: budget={options.budget} is less than {cls.stays}={count}, which always stay")

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns the budget into tokens."""
        super().begin(prompt_len, max_new_tokens)
        most = window_tokens(self.options.budget, prompt_len, prompt_len + max_new_tokens)
        self.tokens = max(most, always(type(self), self.options))

    def budget(self, layer: int) -> int:
        """Tokens that each KV head of a layer keeps: the same in all; more than there are keeps everything."""
        return self.tokens

    def looks(self) -> int:
        """How many of a prompt's last queries `score` looks at; by itself it may look at all of them."""
        return self.prompt_len

    def score(self, layers: range, heads: Heads) -> Tensor:
        """How much each token is worth, [layers * kv_heads, n] float32; infinity for tokens that must stay.

        The heads of layers stand side by side, those of the first layer first. What is reduced over heads is so over
        those of a layer: `x.view(len(layers), -1, n)`.

        Args:
            layers: one or more.
            heads: keys and values of n tokens, [n, layers * kv_heads, d], and queries, [m, layers * heads, d], of the
                last m of these: in the prefill at least the last `looks`, in decode the new one.

        Returns:
            [layers * kv_heads, n], or [layers, n] where all heads of a layer keep the same tokens.
        """
        raise NotImplementedError

    def choose(self, scores: Tensor, counts: Sequence[int]) -> Tensor:
        """Which tokens stay, of equal ones the first.

        Args:
            scores: as `score` gives them.
            counts: of each layer's heads, at most n.

        Returns:
            [len(scores), max(counts)] int64, ascending; what is behind a layer's count means nothing.
        """
        return best_of(scores, counts)

    def survivors(self, layer: int, heads: Heads) -> Tensor | None:
        """The index of the tokens of a layer that stay (`heads` as in `score`), [m, kv_heads] or [m]; None for all."""
        if self.budget(layer) >= len(heads.k):
            return None
        chosen = self.chosen(range(layer, layer + 1), heads)
        with self.model.part("select"):
            return _index(chosen())

    def evicts_in_decode(self) -> bool:
        """Whether the budget bounds the cache in decode, too."""
        return False

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Attends to everything, and stores what stays."""
        if step.phase == "prefill":
            return self._prefill(layer, heads, step)
        if self.evicts_in_decode():
            return torch.cat([self._decode(layer, row, step) for row in heads.single()])
        return super().attend(layer, heads, step)

    def _prefill(self, layer: int, heads: Heads, step: Step) -> Tensor:
        if self.budget(layer) >= len(heads):
            self._store(layer, heads, None)
            return self.causal(layer, heads)
        # Choosing takes few multiprocessors: the others attend meanwhile.
        chosen = beside(self.chosen(range(layer, layer + 1), heads), heads.k.device)
        attended = self.causal(layer, heads)
        with self.model.part("select"):
            index = _index(chosen())
        self._store(layer, heads, index)
        return attended

    def chosen(self, layers: range, heads: Heads) -> Callable[[], Tensor]:
        """Rates the tokens of layers, some of which do not keep all; returns what gives the lists of `choose`."""
        with self.model.part("score"):
            scores = self.score(layers, heads)
        return partial(self.choose, scores, self._counts(layers, len(heads.k)))

    def held_queries(self) -> int | None:
        """Those that `score` looks at."""
        return self.looks()

    def settle(self, layers: range, heads: Heads) -> None:
        """Stores what stays of several layers."""
        counts = self._counts(layers, len(heads))
        if min(counts) == len(heads):
            self._store_all(layers, heads)
        else:
            take_each([self.cache[layer] for layer in layers], heads, self.chosen(layers, heads)(), counts)

    def _counts(self, layers: range, tokens: int) -> list[int]:
        return [min(self.budget(layer), tokens) for layer in layers]

    def _store_all(self, layers: range, heads: Heads) -> None:
        for layer, keys, values in zip(layers, *(x.chunk(len(layers), 1) for x in (heads.k, heads.v)), strict=True):
            self.cache[layer].append(keys, values, heads.positions)

    def _store(self, layer: int, heads: Heads, index: Tensor | None) -> None:
        if index is None:
            self.cache[layer].append(heads.k, heads.v, heads.positions)
            return
        with self.model.part("gather"):
            take(self.cache[layer], heads.k, heads.v, heads.positions, index)

    def _decode(self, layer: int, row: Heads, step: Step) -> Tensor:
        out, cache = super().attend(layer, row, step), self.cache[layer]
        index = self.survivors(layer, Heads(row.q, cache.keys, cache.values, row.positions))
        if index is not None:
            cache.keep(index)
        return out

    def replay(self) -> Replay | None:
        """Every new token attends to all that is left, and nothing leaves."""
        return None if self.evicts_in_decode() else self.dense_replay

    def tokens_requested(self) -> list[int]:
        """The budgets."""
        return [min(self.budget(layer), self.prompt_len) for layer in range(self.model.shape.layers)]


def _index(lists: Tensor) -> Tensor:
    """One layer's lists of tokens, as caches take them."""
    return lists.T.squeeze(1)


def always(method: type[Evicting], options: OptionSet) -> int:
    """How many tokens stay whatever they are worth."""
    return int(getattr(options, method.stays)) if method.stays else 0


def last_stay(scores: Tensor, count: int) -> Tensor:
    """Scores of all but the last `count` tokens, [heads, n], with infinity for those: [heads, n + count]."""
    return pad(scores, (0, count), value=torch.inf)
