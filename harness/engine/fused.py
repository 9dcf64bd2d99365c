"""The two verbs of a layer with fewer passes over memory: joined weights, Triton kernels between the products.

q, k and v are one matrix, gate and up another: the stock modules' parameters become views of them, so no byte is stored
twice. Norm, rotation and SwiGLU are one pass each, and residuals are added by the matrix product itself. One row, the
decode step, takes its own kernels, in which a product and everything around it is one launch
(`harness.engine.kernels.gemv`). Sums are float32 everywhere, so results differ from the stock model's by rounding only.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from harness.engine.hardware import dependent_launch
from harness.engine.parallel import ALONE, Ranks
from harness.engine.rotary import Rotary
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows
from harness.engine.verbs import Verbs
from harness.errors import InputError

_MOST_GROUPED = 16


def check_engine(kind: str, device: torch.device) -> None:
    """Whether an engine can run on a device at all, before a model is loaded.

    Raises:
        InputError: it cannot.
    """
    if kind in ("fused", "graphed") and device.type != "cuda":
        raise InputError(f"--engine {kind} does not run here: it needs a CUDA device")


def why_not_fused(model: Any, shape: ModelShape) -> str:
    """Why the kernels do not run for this model where it is; "" if they do."""
    layer, weight = model.model.layers[0], model.lm_head.weight
    for fails, reason in (
        (not weight.is_cuda, "the model is not on a CUDA device"),
        (find_spec("triton") is None, "Triton is not installed"),
        (weight.element_size() != 2, f"they work in 16 bits, the model is in {weight.dtype}"),
        (layer.self_attn.o_proj.bias is not None or layer.mlp.gate_proj.bias is not None, "biases beyond q, k and v"),
        (model.config.hidden_act != "silu", f"activation {model.config.hidden_act}"),
        (shape.head_dim < 16 or shape.head_dim & (shape.head_dim - 1), f"head_dim {shape.head_dim} is no power of two"),
        (shape.heads > _MOST_GROUPED * shape.kv_heads, f"more than {_MOST_GROUPED} query heads share a KV head"),
    ):
        if fails:
            return reason
    return ""


class FusedVerbs(Verbs):
    """The same verbs through joined weights and Triton."""

    kind = "fused"

    def __init__(self, model: Any, shape: ModelShape, ranks: Ranks = ALONE) -> None:
        """Joins the weights of `model`, in place; see `Verbs`."""
        from harness.engine.kernels import gemv, rowwise

        super().__init__(model, shape, ranks)
        # Products add the residual stream, which counts once in a sum over the ranks.
        self._first = int(ranks.rank == 0)
        self._nothing = model.lm_head.weight.new_zeros((1, shape.hidden))
        self._gemv, self._rowwise = gemv, rowwise
        self.rotary = _FusedRotary(model.model.rotary_emb)
        self._pdl = dependent_launch(model.lm_head.weight.device)
        blocks = [(block.self_attn, block.mlp) for block in self.layers]
        self._qkv = [_join(attention.q_proj, attention.k_proj, attention.v_proj) for attention, _ in blocks]
        self._gate_up = [_join(mlp.gate_proj, mlp.up_proj) for _, mlp in blocks]
        self._head_norms = hasattr(self.layers[0].self_attn, "q_norm")

    def project(self, layer: int, rows: Rows) -> Heads:
        """One product; queries, keys and values are views of its result."""
        qkv = self._project_row(layer, rows) if len(rows) == 1 else self._project_rows(layer, rows)
        keys = self.shape.heads + self.shape.kv_heads
        q, k, v = qkv.tensor_split((self.shape.heads, keys), 1)
        if self._head_norms:
            attention = self.layers[layer].self_attn
            q, k = attention.q_norm(q), attention.k_norm(k)
            cos, sin = self.rotary.angles(q, rows.positions)
            q, k = self._rowwise.rotate_(q, cos, sin), self._rowwise.rotate_(k, cos, sin)
        return Heads(q, k, v, rows.positions)

    def _project_rows(self, layer: int, rows: Rows) -> Tensor:
        norm, (weight, bias) = self.layers[layer].input_layernorm, self._qkv[layer]
        hidden = self._rowwise.rms_norm(rows.hidden, norm.weight, norm.variance_epsilon)
        qkv = self._split(nn.functional.linear(hidden, weight, bias))
        if not self._head_norms:
            self._rowwise.rotate_(qkv[:, : -self.shape.kv_heads], *self.rotary.angles(qkv, rows.positions))
        return qkv

    def _project_row(self, layer: int, rows: Rows) -> Tensor:
        norm, (weight, bias) = self.layers[layer].input_layernorm, self._qkv[layer]
        angles = None if self._head_norms else self.rotary.angles(rows.hidden, rows.positions)
        rotated = weight.shape[0] - self.shape.kv_heads * self.shape.head_dim
        return self._split(
            self._gemv.qkv_gemv(
                rows.hidden, norm.weight, norm.variance_epsilon, weight, bias, angles, self.shape.head_dim, rotated,
                pdl=self._pdl,
            )
        )  # fmt: skip

    def feed_forward(self, layer: int, rows: Rows) -> Rows:
        """Adds to `rows.hidden` in place where there is more than one row."""
        assert rows.attended is not None
        update = self._feed_row if len(rows) == 1 else self._feed_rows
        return Rows(update(layer, rows.hidden, rows.attended), rows.positions)

    def _feed_rows(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self.layers[layer]
        norm = block.post_attention_layernorm
        self.ranks.sum_(hidden.addmm_(attended, block.self_attn.o_proj.weight.T, beta=self._first))
        normed = self._rowwise.rms_norm(hidden, norm.weight, norm.variance_epsilon)
        gate_up = nn.functional.linear(normed, self._gate_up[layer][0])
        gated = self._rowwise.swiglu_(gate_up)
        return self.ranks.sum_(hidden.addmm_(gated, block.mlp.down_proj.weight.T, beta=self._first))

    def _feed_row(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self.layers[layer]
        norm = block.post_attention_layernorm
        hidden = self._added(hidden, attended, block.self_attn.o_proj.weight)
        gated = self._gemv.swiglu_gemv(
            hidden, norm.weight, norm.variance_epsilon, self._gate_up[layer][0], pdl=self._pdl
        )
        return self._added(hidden, gated, block.mlp.down_proj.weight)

    def _added(self, hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        base = hidden if self._first else self._nothing
        return self.ranks.sum_(self._gemv.add_gemv(base, x, weight, pdl=self._pdl))

    def logits(self, rows: Rows) -> Tensor:
        """Logits of the last row alone, [vocab]."""
        weight, eps = self.norm.weight, self.norm.variance_epsilon
        out = self._gemv.norm_gemv(rows.hidden[-1:], weight, eps, self.lm_head.weight, pdl=self._pdl)
        return self._all_ranks(out)[0]

    def all_logits(self, rows: Rows) -> Tensor:
        """Logits of every row, [n, vocab]."""
        if len(rows) == 1:
            return self.logits(rows).unsqueeze(0)
        hidden = self._rowwise.rms_norm(rows.hidden, self.norm.weight, self.norm.variance_epsilon)
        return self._all_ranks(nn.functional.linear(hidden, self.lm_head.weight))


class _FusedRotary(Rotary):
    """Angles in one launch instead of a dozen, which a decode step would notice."""

    def _angles_at(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        from harness.engine.kernels.rowwise import angles

        return angles(positions, self._module.inv_freq, self._module.attention_scaling, like.dtype)


@torch.no_grad()
def _join(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """Stacks the weights (and biases) of linear layers, which from now on are views of the stack."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    begin = 0
    for linear in linears:
        part = slice(begin, begin + linear.weight.shape[0])
        linear.weight.data, begin = weight[part], part.stop
        if bias is not None:
            linear.bias.data = bias[part]
    return weight, bias
