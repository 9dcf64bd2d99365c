"""Attention to everything or to lists, and lists chosen from it; interpreted where there is no GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from harness.engine.request import Request
from tests.engine.test_replay import NONE, PROMPT, attention_alone, rehearsed
from tests.methods.test_duo import written
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import build

ListedAttention = kernels("listed_attention").ListedAttention
WHOLE = [True, False, True]


@pytest.mark.parametrize("vote", ["mean", "max"])
@pytest.mark.parametrize(
    ("length", "group", "count", "splits"), [(70, 3, 20, 4), (70, 1, 64, 1), (9, 2, 20, 3), (0, 4, 5, 2)]
)
def test_heads_attend_to_all_or_to_their_list_and_choose_what_they_paid_most(
    length: int, group: int, count: int, splits: int, vote: str
) -> None:
    draw = torch.Generator().manual_seed(length + group)
    kv_heads, d, room = len(WHOLE), 16, 80
    keys, values = torch.full((2, room, kv_heads, d), torch.nan).to(DEVICE)
    keys[:length], values[:length] = torch.randn(2, length, kv_heads, d, generator=draw).to(DEVICE)
    q, k, v = (torch.randn(n, d, generator=draw).to(DEVICE) for n in (kv_heads * group, kv_heads, kv_heads))
    table = torch.tensor([[0, 0, 0], [keys.data_ptr(), values.data_ptr(), length]], device=DEVICE)
    attention = ListedAttention(kv_heads * group, kv_heads, d, room, count, DEVICE, splits)
    listed = min(count, length)
    for head in range(kv_heads):
        attention.tokens[0, head, :listed] = torch.randperm(length, generator=draw)[:listed].sort().values.to(DEVICE)
    before = attention.tokens[0].clone()
    news = (x.unsqueeze(0) for x in (q, k, v))
    out = attention.attend(*news, torch.tensor(WHOLE, device=DEVICE), table, 1).view(-1, d)
    assert torch.equal(keys[length], k) and torch.equal(values[length], v)
    attention.choose(torch.tensor([0, 2], device=DEVICE), table, 1, vote)
    assert torch.equal(attention.tokens[0, 1], before[1])
    for head in range(kv_heads):
        seen = torch.arange(length, device=DEVICE) if WHOLE[head] else before[head, :listed]
        seen = torch.cat((seen, seen.new_tensor([length])))
        rows = slice(head * group, (head + 1) * group)
        paid = (q[rows] @ keys[seen, head].T / math.sqrt(d)).softmax(-1)
        torch.testing.assert_close(out[rows], paid @ values[seen, head], atol=1e-5, rtol=1e-4)
        if WHOLE[head]:
            rated = paid[:, :-1].mean(0) if vote == "mean" else paid[:, :-1].amax(0)
            assert attention.tokens[0, head, :listed].tolist() == rated.topk(listed).indices.sort().values.tolist()


@pytest.mark.parametrize("vote", ["mean", "max"])
@pytest.mark.slow
def test_replayed_steps_give_the_same_tokens(vote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed(monkeypatch)
    stock, fused = attention_alone(layers=4)
    file = written(tmp_path, [[0, 0], [0.9, 0.1], [0.2, 0.3], [0.1, 0.8]])
    text = f"lychee:budget=12:retrieval=0.5:vote={vote}:heads={file}"
    expected, method = build(text, stock), build(text, fused)
    plain = list(stock.stream(expected, Request(PROMPT[:70], 6)))
    stop = frozenset({next(token for at, token in enumerate(plain) if at >= 2 and token not in plain[:at])})
    # The second prompt fits the budget at first; in the last one a step is begun in vain.
    for length, new, ends in ((64, 4, NONE), (9, 6, NONE), (80, 2, NONE), (70, 6, stop)):
        request = Request(PROMPT[:length], new, ends)
        assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
        assert method.decode_bytes() == expected.decode_bytes()
        for ours, theirs in zip(method.cache, expected.cache, strict=True):
            assert torch.equal(ours.token_positions, theirs.token_positions)
            assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
    assert method.extra_bytes() > 0 and method.replay() is not method.dense_replay
