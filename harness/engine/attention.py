"""Exact attention behind one door, whatever kernel is behind it.

All shapes are token-major: queries [n, heads, d], keys and values [m, kv_heads, d] with heads a multiple of kv_heads.
Survivors of pruning keep their order, so dense causal attention over gathered rows *is* exact attention among them, and
no mask is ever built for a prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from harness.engine.shape import ModelShape
from harness.errors import InputError

_UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN, which takes tens of milliseconds to plan for a new shape, and every decode step brings one."""


class Attention:
    """PyTorch's scaled dot product attention, with the backend that it picks itself.

    Attributes:
        kernel: its name.
        backend: PyTorch's, where that is chosen here.
        serves: whether that backend takes such inputs, where it may not. One that is called all the same prints why it
            does not, a dozen warnings.
        takes_views: `normalised` takes fewer queries than keys (the last ones'), and keys that overlap in memory.
        takes_pages: `paged` is a kernel, for pages of 128 keys, 128 channels a head and 128 rows a text.
    """

    kernel = "sdpa"
    takes_views = takes_pages = False
    backend: Callable[[], AbstractContextManager[Any]] = nullcontext
    serves: Callable[[SDPAParams], bool] | None = None

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries are the last n of the m keys' tokens; each sees its own key and all before it.

        Returns:
            [n, heads * d].
        """
        n, m = q.shape[0], k.shape[0]
        if n == 1 or n != m:
            return self.masked(q, k, v, None if n == 1 else _lower_right(n, m, q.device))
        with type(self).backend():
            return _sdpa(q, k, v, None, is_causal=True)

    def normalised(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[Tensor, Tensor]:
        """Attention in each of b texts by itself, with what it takes to join it with attention to other keys.

        Args:
            q: [b, n, heads, d]. k, v: [b, m, kv_heads, d]; m is n where attention is causal.
            causal: each query sees its own key and all before it; else all.

        Returns:
            [b, n, heads, d], and the log of each softmax's denominator, [b, n, heads] float32.
        """
        # The public function keeps the denominators to itself; the operators behind it hand them out.
        n, heads, aten = *q.shape[1:3], torch.ops.aten
        q, k, v = (x.transpose(1, 2) for x in (q, repeated_heads(k, heads), repeated_heads(v, heads)))
        if q.is_cuda:
            out, norm, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, is_causal=causal)
        else:
            out, norm, *_ = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)
        return out.transpose(1, 2), norm[:, :, :n].transpose(1, 2)

    def windowed(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Each query sees its own key and those less than `window` before it.

        Cut the text into blocks as long as the window. A query sees its own block up to itself, which is causal
        attention, and of the block before it what is less than a window away, which is causal attention read backwards.

        Args:
            q: [n, heads, d]. k, v: [n, kv_heads, d].
            window: at least 1.

        Returns:
            [n, heads, d], and the log of each softmax's denominator, [n, heads] float32.
        """
        n, blocks = len(q), [_blocks(x, window) for x in (q, k, v)]
        parts = [self.normalised(*blocks)]
        if n > window > 1:
            parts.append(self._block_before(*blocks))
        return joined([(out.flatten(0, 1)[:n], norm.flatten(0, 1)[:n]) for out, norm in parts])

    def _block_before(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Query r of a block sees key c of the one before it where c > r; from the end, that is c' <= r' - 1."""
        out, norm = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=q.device)
        found, weight = self.normalised(q[1:, :-1].flip(1), k[:-1, 1:].flip(1), v[:-1, 1:].flip(1))
        out[1:, :-1], norm[1:, :-1] = found.flip(1), weight.flip(1)
        return out, norm

    def paged(self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, counts: Tensor) -> Tensor:
        """Causal attention in each of b texts by itself, whose keys are pages; its rows are those of its last keys.

        Args:
            q: [b, n, heads, d]. k, v: [pages, size, kv_heads, d]; pages may overlap.
            pages: [b, most] int32, those of each text. counts: [b] int32, how many of them count; whole ones.

        Returns:
            [b, n, heads, d].
        """
        texts = [(one, pages[i, :count].long()) for i, (one, count) in enumerate(zip(q, counts.tolist(), strict=True))]
        outs = [self.causal(one, k[at].flatten(0, 1), v[at].flatten(0, 1)) for one, at in texts]
        return torch.stack(outs).view(q.shape)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention where `mask` ([n, m] or [heads, n, m] bool) is true; None is everywhere.

        Returns:
            [n, heads * d].
        """
        if mask is not None and mask.is_cuda:  # where the fused kernels take a mask or grouped heads, not both
            k, v = repeated_heads(k, q.shape[1]), repeated_heads(v, q.shape[1])
        with sdpa_kernel(_UNPLANNED):
            return _sdpa(q, k, v, mask, is_causal=False)


class CudnnAttention(Attention):
    """PyTorch's, through cuDNN."""

    kernel = "cudnn"
    backend = staticmethod(lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
    serves = staticmethod(can_use_cudnn_attention)


class FlashSdpaAttention(Attention):
    """PyTorch's, through its own copy of FlashAttention 2."""

    kernel = "flash"
    backend = staticmethod(lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    serves = staticmethod(can_use_flash_attention)


class Flash2Attention(Attention):
    """FlashAttention 2 (Dao, arXiv 2307.08691), package `flash-attn`."""

    kernel = "fa2"
    module = "flash_attn"

    def __init__(self) -> None:
        """Imports the package."""
        self._attend = import_module(self.module).flash_attn_func

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in `Attention`; the kernel aligns fewer queries with the last keys by itself."""
        out = self._attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), causal=True)
        # Some versions also return the log-sum-exp.
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended.view(q.shape[0], -1)

    def normalised(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[Tensor, Tensor]:
        """As in `Attention`."""
        out, norm, *_ = self._attend(q, k, v, causal=causal, return_attn_probs=True)
        return out, norm.transpose(1, 2)

    def windowed(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """As in `Attention`; the kernel knows windows."""
        texts = (x.unsqueeze(0) for x in (q, k, v))
        out, norm, *_ = self._attend(*texts, causal=True, window_size=(window - 1, 0), return_attn_probs=True)
        return out[0], norm[0].T


class Flash3Attention(Flash2Attention):
    """FlashAttention 3 (Shah et al., arXiv 2407.08608) for Hopper, package `fa3-fwd`."""

    kernel = "fa3"
    module = "fa3_fwd_interface"
    windowed = Attention.windowed  # the package is built without windows
    takes_views = takes_pages = True

    def __init__(self) -> None:
        """Imports the package."""
        super().__init__()
        self._forward = torch.ops.fa3_fwd.fwd

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in `Attention`, by the operator itself: what the package wraps it in costs the host several launches."""
        texts, scale = (x.unsqueeze(0) for x in (q, k, v)), q.shape[-1] ** -0.5
        out: Tensor = self._forward(*texts, softmax_scale=scale, is_causal=True, num_splits=1)[0]
        return out.view(q.shape[0], -1)

    def paged(self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, counts: Tensor) -> Tensor:
        """As in `Attention`, without waiting for the device."""
        rows = q.shape[1]
        out: Tensor = self._forward(
            q.flatten(0, 1),
            k,
            v,
            cu_seqlens_q=torch.arange(0, q.shape[0] * rows + 1, rows, dtype=torch.int32, device=q.device),
            seqused_k=counts * k.shape[1],
            # One row more than there is: texts of no more rows than a tile has would be read without the hardware's
            # copies of whole pages, which the package is built without.
            max_seqlen_q=rows + 1,
            page_table=pages,
            softmax_scale=q.shape[-1] ** -0.5,
            is_causal=True,
            num_splits=1,
            pack_gqa=False,
        )[0]
        return out.view(q.shape)


KERNELS: dict[str, type[Attention]] = {
    kind.kernel: kind for kind in (Flash3Attention, Flash2Attention, CudnnAttention, FlashSdpaAttention, Attention)
}
"""By name, the fastest first (measured: docs/performance.md)."""


def check_attention(name: str, device: torch.device) -> None:
    """Whether a kernel can be there at all, before a model is loaded.

    Raises:
        InputError: it cannot.
    """
    if name in ("auto", "sdpa"):
        return
    if device.type != "cuda":
        raise InputError(f"--attention {name} needs a CUDA device; on a CPU there is sdpa")
    kind = KERNELS[name]
    if issubclass(kind, Flash2Attention) and find_spec(kind.module) is None:
        raise InputError(f"--attention {name}: the Python module {kind.module} is not installed")


def pick_attention(name: str, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Attention:
    """The kernel of that name, or for "auto" the first that works on this device for this shape and dtype.

    Raises:
        InputError: the one that was asked for does not.
    """
    if name == "auto" and device.type != "cuda":
        return Attention()
    for kind in KERNELS.values() if name == "auto" else [KERNELS[name]]:
        if attention := _working(kind, shape, device, dtype):
            return attention
    raise InputError(f"--attention {name} does not run here with head_dim {shape.head_dim} in {dtype}")


def _working(kind: type[Attention], shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Attention | None:
    q = torch.zeros((64, shape.heads, shape.head_dim), dtype=dtype, device=device)
    k = q[:, : shape.kv_heads].contiguous()
    if not _served(kind, q, k):
        return None
    try:
        attention = kind()
        attention.causal(q, k, k)
    # Not installed, another GPU, or a shape that it does not serve: kernels say so in different ways.
    except (ImportError, AttributeError, RuntimeError, ValueError, AssertionError, NotImplementedError):
        return None
    return attention


def _served(kind: type[Attention], q: Tensor, k: Tensor) -> bool:
    if kind.serves is None:
        return True
    rows, keys = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    with kind.backend():
        return kind.serves(SDPAParams(rows, keys, keys, None, 0.0, True, q.shape[1] != k.shape[1]))


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values with each KV head repeated for every query head that reads it: [..., kv, d] -> [..., heads, d]."""
    return x.repeat_interleave(heads // x.shape[-2], -2)


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention to all keys from that to some and to others, as flash-decoding joins its shares (Dao et al., 2023).

    Args:
        parts: results [n, heads, d] and logs of their softmaxes' denominators, [n, heads] float32.

    Returns:
        The same of the whole.
    """
    if len(parts) == 1:
        return parts[0]
    norms = torch.stack([norm for _, norm in parts])
    shares = norms.softmax(0).unsqueeze(-1)
    whole = parts[0][0] * shares[0]
    for (out, _), share in zip(parts[1:], shares[1:], strict=True):
        whole.addcmul_(out, share)
    return whole.to(parts[0][0].dtype), norms.logsumexp(0)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[n, h, d] -> [blocks, size, h, d]; what the last block lacks is behind every query that counts."""
    missing = -x.shape[0] % size
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).view(-1, size, *x.shape[1:])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = sdpa(q, k, v, attn_mask=mask, is_causal=is_causal, scale=q.shape[-1] ** -0.5, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1).reshape(q.shape[2], -1)


def _lower_right(n: int, m: int, device: torch.device) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
