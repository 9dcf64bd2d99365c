"""Where kvpress (optional, not a dependency) has the same rule, the same prompt leaves the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.test_eviction import distinct_ids, held, run
from tests.methods.test_references import Model
from tests.tiny import build, tiny_engine, tiny_model

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")

LENGTH = 128
HALF = {"compression_ratio": 0.5}  # exact in binary, so that both round alike


def presses() -> dict[str, Any]:
    """Our spelling of each of kvpress's rules that is the same."""
    snap = kvpress.SnapKVPress(window_size=8, kernel_size=5, **HALF)
    expected = kvpress.ExpectedAttentionPress(n_future_positions=64, **HALF)
    bare = kvpress.ExpectedAttentionPress(use_vnorm=False, **HALF)
    return {
        "snapkv:budget=0.5:window=8:kernel=5:pool=avg": snap,
        "knorm:budget=0.5": kvpress.KnormPress(**HALF),
        "keydiff:budget=0.5:block=0": kvpress.KeyDiffPress(**HALF),
        "keydiff:budget=0.5:block=16": kvpress.BlockPress(kvpress.KeyDiffPress(**HALF), block_size=16),
        "expected:budget=0.5:future=64": expected,
        "criticalkv:budget=0.5:base=expected": kvpress.CriticalKVPress(bare),
        "criticalkv:budget=0.5:base=knorm": kvpress.CriticalKVPress(kvpress.KnormPress(**HALF)),
    }


class Compressed:
    """What a press leaves of every layer's keys, found behind a dense prefill of the stock model.

    Attributes:
        kept: layer -> KV head -> positions.
    """

    def __init__(self, press: Any, model: Any, ids: Tensor) -> None:
        self.press, self.kept = press, list[list[set[int]]]()
        press.post_init_from_model(model)
        hooks = [self._watch(layer.self_attn, model.model.rotary_emb) for layer in model.model.layers]
        with torch.inference_mode():
            model(ids.unsqueeze(0), use_cache=True)
        for hook in hooks:
            hook.remove()

    def _watch(self, attention: nn.Module, rotary: nn.Module) -> Any:
        attention.rotary_emb = rotary
        return attention.register_forward_hook(self._compress, with_kwargs=True)

    def _compress(self, module: Any, _: Any, inputs: dict[str, Any], out: Any) -> None:
        cached = inputs["past_key_values"].layers[module.layer_idx]
        keys, _ = self.press.compress(module, inputs["hidden_states"], cached.keys, cached.values, None, inputs)
        self.kept.append([positions(*head) for head in zip(cached.keys[0], keys[0], strict=True)])


def positions(there: Tensor, left: Tensor) -> set[int]:
    """Which rows of `there`, [n, d], are the rows of `left`, [m, d]."""
    return set((left.unsqueeze(1) == there).all(2).int().argmax(1).tolist())


MODELS = [("llama", "MHA"), ("llama", "GQA"), ("qwen2", "MQA")]


def both(name: str, press: Any, model: Model) -> tuple[list[list[set[int]]], list[list[set[int]]]]:
    """Layer -> KV head -> what we keep, and what the press keeps."""
    ids, method = distinct_ids(LENGTH), build(name, tiny_engine(*model))
    run(method, ids, LENGTH, model)
    return held(method, method.model.shape.kv_heads), Compressed(press, tiny_model(*model), ids).kept


@pytest.mark.parametrize("name", presses())
@pytest.mark.parametrize("model", MODELS)
def test_it_keeps_what_kvpress_keeps(name: str, model: Model) -> None:
    ours, theirs = both(name, presses()[name], model)
    assert ours == theirs


@pytest.mark.parametrize("model", MODELS)
def test_tova_differs_by_the_newest_token_alone_which_kvpress_always_keeps(model: Model) -> None:
    ours, theirs = both("tova:budget=0.5", kvpress.TOVAPress(**HALF), model)
    pairs = [heads for layers in zip(ours, theirs, strict=True) for heads in zip(*layers, strict=True)]
    assert all(len(kept) == len(left) == LENGTH // 2 for kept, left in pairs)
    assert all(left - kept <= {LENGTH - 1} for kept, left in pairs)
