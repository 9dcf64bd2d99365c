"""Full attention as the teacher of the same model under gated heads.

The methods that gates are for read a prompt densely, and differ from full attention in the tokens behind it. So the
context's keys and values are full attention's, read once, and only what follows (questions and answers) goes through
the gated model. Its attention in a KV head with gate g is

    g * (attention to everything) + (1 - g) * (attention to what a head without it would see),

and what is to be small is how far the last hidden states of those rows are from the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harness.calibrate.passkeys import Passkeys
from harness.engine.attention import Attention
from harness.engine.step import Rows
from harness.engine.verbs import Verbs
from harness.models.load import LoadedModel


class Sparse(Protocol):
    """What a head sees whose gate is 0."""

    def seen(self, paid: Tensor, gate: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which tokens, each row's own (of the last n tokens) among them, and what is handed to the next layer.

        Args:
            paid: attention to everything, mean over the query heads of a KV head, [kv_heads, n, m].
            gate: of the layer's heads, [kv_heads].
            above: what the layer before has handed down; None in the first.

        Returns:
            Both [kv_heads or 1, n, m] bool.
        """


@dataclass(frozen=True)
class Lesson:
    """What the teacher made of a text.

    Attributes:
        ids: [n], what stands behind the context.
        positions: [n], theirs.
        answers: [n] bool, which of them are of an answer.
        keys, values: of the context, a tensor [m, kv_heads, d] a layer.
        hidden: the teacher's last hidden states of the n rows, normed, [n, hidden] float32.
    """

    ids: Tensor
    positions: Tensor
    answers: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor


class Distillation:
    """One model, whose weights are never trained."""

    def __init__(self, model: LoadedModel) -> None:
        """
        Args:
            model: on the device where it is to run.
        """
        body = model.model.model
        self.shape, self.device = model.shape, model.model.device
        self._embed, self._norm, self._head = body.embed_tokens, body.norm, model.model.lm_head
        self._verbs, self._attention = Verbs(model.model, model.shape), Attention()

    @torch.no_grad()
    def lesson(self, text: Passkeys) -> Lesson:
        """Reads a text under full attention."""
        ids, place = text.ids.to(self.device), torch.arange(len(text.ids), device=self.device)
        rows, keys, values = Rows(self._embed(ids), place), list[Tensor](), list[Tensor]()
        for layer in range(self.shape.layers):
            heads = self._verbs.project(layer, rows)
            keys.append(heads.k[: text.context].clone())
            values.append(heads.v[: text.context].clone())
            attended = self._attention.causal(heads.q, heads.k, heads.v)
            rows = self._verbs.feed_forward(layer, rows.with_attended(attended))
        behind, hidden = slice(text.context, None), self._norm(rows.hidden[text.context :]).float()
        return Lesson(ids[behind], place[behind], text.answers.to(self.device), keys, values, hidden)

    def hidden(self, lesson: Lesson, gates: Tensor, sparse: Sparse) -> Tensor:
        """Last hidden states, normed, of the rows behind the context under gates [layers, kv_heads]: [n, hidden]."""
        hidden, handed = self._embed(lesson.ids), None
        for layer, gate in enumerate(gates.unbind()):
            # Recomputed on the way back, so that memory holds the attention of one layer and not of all.
            hidden, handed = checkpoint(
                self._layer, layer, hidden, gate, handed, lesson, sparse, use_reentrant=False, preserve_rng_state=False
            )
        last: Tensor = self._norm(hidden).float()
        return last

    @staticmethod
    def error_of(lesson: Lesson, hidden: Tensor) -> Tensor:
        """Squared distance to the teacher's hidden states, as a share of their own square."""
        away = (hidden - lesson.hidden).square().sum()
        return away / lesson.hidden.square().sum()

    @torch.no_grad()
    def accuracy(self, lesson: Lesson, hidden: Tensor) -> float:
        """Share of the answers' tokens that a model with these hidden states, [n, hidden], would have said itself."""
        asked = lesson.answers[1:].nonzero().flatten()
        said = self._head(hidden[asked].to(self._head.weight.dtype)).argmax(1)
        return float((said == lesson.ids[asked + 1]).float().mean())

    def _layer(
        self, layer: int, hidden: Tensor, gate: Tensor, above: Tensor | None, lesson: Lesson, sparse: Sparse
    ) -> tuple[Tensor, Tensor]:
        heads = self._verbs.project(layer, Rows(hidden, lesson.positions))
        k, v = (torch.cat(pair) for pair in ((lesson.keys[layer], heads.k), (lesson.values[layer], heads.v)))
        (n, m), kv_heads = (len(heads), len(k)), k.shape[1]
        queries = heads.q.view(n, kv_heads, -1, self.shape.head_dim).permute(1, 2, 0, 3)
        logits = (queries @ k.permute(1, 2, 0).unsqueeze(1)).float() * self.shape.head_dim**-0.5
        future = torch.ones(n, m, dtype=torch.bool, device=k.device).triu(m - n + 1)
        logits = logits.masked_fill(future, -torch.inf)
        full = logits.softmax(-1)
        seen, handed = sparse.seen(full.detach().mean(1), gate.detach(), above)
        few = logits.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
        # Outputs are linear in the weights, so mixing these is mixing those.
        share = gate.view(-1, 1, 1, 1)
        mixed = (share * full + (1 - share) * few).to(v.dtype) @ v.transpose(0, 1).unsqueeze(1)
        attended = mixed.permute(2, 0, 1, 3).reshape(n, -1)
        return self._verbs.feed_forward(layer, Rows(hidden, lesson.positions, attended)).hidden, handed
