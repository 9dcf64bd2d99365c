"""The gates that are trained: one number for each KV head, and what pulls them down."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.calibrate.distill import Sparse
from harness.engine.shape import ModelShape
from methods.common.gates import full_heads

_LOW, _HIGH = -0.1, 1.1
"""What HardKuma stretches the unit interval to, before it is cut back (Bastings et al., 2019)."""


class Training(Protocol):
    """Gates in training.

    Attributes:
        sparse: what a head sees whose gate is 0.
    """

    sparse: Sparse

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """What Adam is to move, and which way."""

    def draw(self, generator: torch.Generator) -> Tensor:
        """Gates for one step, [layers, kv_heads]."""

    def penalty(self) -> Tensor:
        """What is added to the error."""

    def settle(self) -> None:
        """Brings parameters that a step moved too far back to where they may be."""

    def values(self) -> Tensor:
        """The gates so far, [layers, kv_heads], 0 to 1."""

    def roles(self) -> Tensor:
        """Gates of 0 and 1 as the method has them."""


class Streaming:
    """DuoAttention's gates (arXiv 2410.10819, section 2.3): numbers cut to 0 to 1, pulled down by their mean."""

    def __init__(
        self, shape: ModelShape, device: torch.device, sinks: int, recent: int, weight: float, share: float
    ) -> None:
        """
        Args:
            shape: of the model.
            device: of the gates.
            sinks, recent: first and last tokens that a head with gate 0 sees beside the newest one.
            weight: of the penalty.
            share: of heads that are full in the end.
        """
        self.sparse: Sparse = _Ends(sinks, recent)
        self._gates = nn.Parameter(torch.ones(shape.layers, shape.kv_heads, device=device))
        self._weight, self._share = weight, share

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The gates."""
        return [{"params": [self._gates], "lr": rate}]

    def draw(self, generator: torch.Generator) -> Tensor:
        """Nothing is drawn."""
        return self._gates

    def penalty(self) -> Tensor:
        """L1."""
        return self._weight * self._gates.abs().mean()

    @torch.no_grad()
    def settle(self) -> None:
        """Cuts gates to 0 to 1."""
        self._gates.clamp_(0, 1)

    def values(self) -> Tensor:
        """As they are."""
        return self._gates.detach()

    def roles(self) -> Tensor:
        """The greatest, at that share."""
        full = full_heads(self.values().cpu(), 1 - self._share)
        return torch.tensor(full, dtype=torch.float32, device=self._gates.device)


class Inheriting:
    """LycheeDecode's gates (arXiv 2602.04541): drawn from a HardKuma distribution, few of them above 0.

    A multiplier grows as long as more heads than wanted are expected to have a gate above 0, and sinks otherwise.
    """

    def __init__(self, shape: ModelShape, device: torch.device, topk: int, share: float) -> None:
        """
        Args:
            shape: of the model.
            device: of the gates.
            topk: tokens that a head with gate 0 sees, the newest one included.
            share: of heads that are to have a gate above 0, the first layer's, which all have, included.
        """
        self.sparse: Sparse = _Inherited(topk)
        # Logs of both parameters: uniform at first.
        self._a, self._b = (nn.Parameter(torch.zeros(shape.layers, shape.kv_heads, device=device)) for _ in range(2))
        self._price, self._share = nn.Parameter(torch.zeros((), device=device)), share

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The distributions, which go down, and the multiplier, which goes up."""
        return [{"params": [self._a, self._b], "lr": rate}, {"params": [self._price], "lr": rate, "maximize": True}]

    def draw(self, generator: torch.Generator) -> Tensor:
        """By the inverse of Kumaraswamy's distribution function, stretched and cut."""
        uniform = torch.rand(self._a.shape, generator=generator).to(self._a.device).clamp(1e-4, 1 - 1e-4)
        kuma = (1 - (1 - uniform) ** (-self._b).exp()) ** (-self._a).exp()
        return self._first_whole((_LOW + (_HIGH - _LOW) * kuma).clamp(0, 1))

    def penalty(self) -> Tensor:
        """The multiplier's price of heads beyond those wanted."""
        return self._price * (self._first_whole(self._above(0.0)).mean() - self._share)

    @torch.no_grad()
    def settle(self) -> None:
        """Fewer heads than wanted are fine."""
        self._price.clamp_(min=0)

    @torch.no_grad()
    def values(self) -> Tensor:
        """How probable a gate above one half is."""
        return self._first_whole(self._above(0.5))

    def roles(self) -> Tensor:
        """Those that are probable."""
        return (self.values() > 0.5).float()

    def _above(self, gate: float) -> Tensor:
        """How probable a greater one is."""
        place = torch.tensor((gate - _LOW) / (_HIGH - _LOW), device=self._a.device)
        return (1 - place ** self._a.exp()) ** self._b.exp()

    def _first_whole(self, gates: Tensor) -> Tensor:
        return torch.cat((torch.ones_like(gates[:1]), gates[1:]))


class _Ends:
    """Sinks, and recent tokens ahead of the newest one."""

    def __init__(self, sinks: int, recent: int) -> None:
        self._sinks, self._recent = sinks, recent

    def seen(self, paid: Tensor, gate: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same in every layer and head."""
        if above is not None:
            return above, above
        n, m = paid.shape[1:]
        token = torch.arange(m, device=paid.device)
        row = token[m - n :].unsqueeze(1)
        ends = ((token <= row) & ((token < self._sinks) | (token >= row - self._recent))).unsqueeze(0)
        return ends, ends


class _Inherited:
    """What the same head of the layer above has handed down, and the newest token."""

    def __init__(self, topk: int) -> None:
        self._topk = topk

    def seen(self, paid: Tensor, gate: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        """A head whose gate is above one half hands down what it attends to most."""
        n, m = paid.shape[1:]
        own = torch.ones(n, m, dtype=torch.bool, device=paid.device).tril(m - n).triu(m - n)
        ranked = paid.masked_fill(own, -1).topk(min(self._topk - 1, m - n), -1).indices
        chosen = own | torch.zeros_like(paid, dtype=torch.bool).scatter_(-1, ranked, True)
        if above is None:
            return chosen, chosen
        return above, torch.where((gate > 0.5).view(-1, 1, 1), chosen, above)
