"""Exact attention behind one door, whatever kernel is behind it.

All shapes are token-major: queries [n, heads, d], keys and values [m, kv_heads, d] with heads a multiple of kv_heads.
Survivors of pruning keep their order, so dense causal attention over gathered rows *is* exact attention among them, and
no mask is ever built for a prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa


class Attention:
    """PyTorch's scaled dot product attention."""

    kernel = "sdpa"

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries are the last n of the m keys' tokens; each sees its own key and all before it.

        Returns:
            [n, heads * d].
        """
        n, m = q.shape[0], k.shape[0]
        if n in (1, m):
            return _sdpa(q, k, v, None, is_causal=n > 1)
        return self.masked(q, k, v, _lower_right(n, m, q.device))

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention where `mask` ([n, m] or [heads, n, m] bool) is true; None is everywhere.

        Returns:
            [n, heads * d].
        """
        return _sdpa(q, k, v, mask, is_causal=False)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = sdpa(q, k, v, attn_mask=mask, is_causal=is_causal, scale=q.shape[-1] ** -0.5, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1).reshape(q.shape[2], -1)


def _lower_right(n: int, m: int, device: torch.device) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
