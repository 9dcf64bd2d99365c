"""The probe behind `harness reproduce diffusion`: a method that drops chosen rows from one layer on.

SlimInfer rests on an observation: by the middle layers, what a critical token said has spread to others, so that even
this token may be dropped. The probe drops it. Rows chosen by their role leave the prefill ahead of layer L; their keys
and values below L stay, as they do when a method prunes.

That alone does not show that anything has spread: generated tokens pass through all layers, and below L they can still
read the dropped tokens' keys and values. `hide` takes those away in decode, so that whatever the answer needs must have
reached other rows, or the last one, before layer L.

It prunes nothing of use to anyone, so it is not among the methods that `harness methods` lists.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.options import OptionSet

Role = Literal["needle", "sentence", "context", "random", "question"]

SINK = 4
"""First tokens that `context` leaves: those that attention rests on (Xiao et al., arXiv 2309.17453)."""


@dataclass(frozen=True)
class Places:
    """Where things are in a prompt, in tokens; spans are [start, end).

    Attributes:
        needle: the number that is asked for.
        sentence: the sentence that says it.
        question: how many of the last tokens ask.
        length: of the prompt.
    """

    needle: tuple[int, int]
    sentence: tuple[int, int]
    question: int
    length: int

    def rows(self, role: Role, seed: str) -> list[int]:
        """Positions that play a role, ascending; the last one, which predicts the answer, plays none.

        `random` are as many as the needle has, of neither sink, sentence nor question; equal seeds draw the same.
        """
        asks = self.length - self.question
        if role == "random":
            others = [at for at in range(SINK, asks) if not self.sentence[0] <= at < self.sentence[1]]
            return sorted(random.Random(seed).sample(others, self.needle[1] - self.needle[0]))
        spans = {
            "needle": self.needle,
            "sentence": self.sentence,
            "context": (SINK, asks),
            "question": (asks, self.length - 1),
        }
        return list(range(*spans[role]))


class Probe(Method):
    """Drops rows of one role from a layer on.

    Attributes:
        name: of the labels in records.
    """

    name = "probe"
    summary = "drops chosen rows from one layer on, to see where their information is"
    simulated = True

    class Options(OptionSet):
        """What to drop, and where."""

        drop: Role = Field(description="which rows")
        layer: Annotated[int, Field(ge=1)] = Field(description="first layer without them")
        hide: bool = Field(False, description="also hide their keys and values below that layer from decode")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.aim([])

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for a layer that the model lacks."""
        assert isinstance(options, cls.Options)
        if options.layer >= shape.layers:
            raise InputError(f"layer {options.layer} is not below the model's {shape.layers} layers")

    def aim(self, positions: Sequence[int]) -> None:
        """Sets the positions that the next request is to lose."""
        self._dropped = torch.tensor(sorted(positions), dtype=torch.int64)

    def reads_as(self, other: Probe) -> bool:
        """Whether the other reads a prompt just as this one: they differ at most in what decode sees."""
        same = (self.options.drop, self.options.layer) == (other.options.drop, other.options.layer)
        return same and self._dropped.equal(other._dropped)

    @torch.inference_mode()
    def follow(self, other: Probe) -> None:
        """Takes over the prompt that another probe has read without the same rows, as it was before decode."""
        self.prompt_len, self.cache = other.prompt_len, other.cache
        for cache in self.cache:
            cache.keep((cache.token_positions < self.prompt_len).nonzero().squeeze(1))

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Full attention; with `hide`, decode does not see the dropped tokens below the layer."""
        if step.phase == "prefill" or not self.options.hide or layer >= self.options.layer:
            return super().attend(layer, heads, step)
        cache = self.cache[layer]
        cache.append(heads.k, heads.v, heads.positions)
        seen = self._staying(cache.token_positions)
        return self.model.attention.causal(heads.q, cache.keys[seen], cache.values[seen])

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Drops the rows ahead of the layer."""
        if step.phase != "prefill" or layer + 1 != self.options.layer:
            return rows
        return rows.select(self._staying(rows.positions))

    def _staying(self, positions: Tensor) -> Tensor:
        """Indices of the positions that are not dropped."""
        return (~torch.isin(positions, self._dropped.to(positions.device))).nonzero().squeeze(1)

    def tokens_requested(self) -> list[int]:
        """The prompt, less the dropped rows from the layer on."""
        left = self.prompt_len - len(self._dropped)
        return [self.prompt_len if layer < self.options.layer else left for layer in range(self.model.shape.layers)]
