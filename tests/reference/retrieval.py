"""RetrievalAttention: both ends of the prompt, and of its middle what each query head matches best."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.reference.model import Twin, best


class RetrievalTwin(Twin):
    """Exact top-k attention: a table says what each row of each head sees."""

    def __init__(self, model: Any, prompt_len: int, total: int, sinks: int, recent: int, topk: int) -> None:
        super().__init__(model, prompt_len, total)
        self.middle, self.topk = range(sinks, prompt_len - recent), topk

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        """[heads, n, total]."""
        mask = self.causal(layer, positions).repeat(q.shape[1], 1, 1)
        if self.decoding and self.middle:
            mask[:, :, self.middle.start : self.middle.stop] = False
            for row, queries in enumerate(q):
                for head, query in enumerate(queries):
                    keys = self.keys[layer, :, head // (q.shape[1] // self.keys.shape[2])]
                    products = [float(query @ keys[position]) for position in self.middle]
                    mask[head, row, [self.middle[index] for index in best(products, self.topk)]] = True
        return mask
