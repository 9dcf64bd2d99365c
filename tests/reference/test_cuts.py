"""The twins of methods that cut once cut where it can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import cuts
from tests.reference.controls import GivenTwin
from tests.reference.cuts import DuoTwin, FastOptions, FastTwin, GemOptions
from tests.reference.model import Trace, Twin
from tests.tiny import LAYERS, random_ids, tiny_model

LENGTH, STEPS = 50, 3


def run(twin: Twin) -> Trace:
    return twin.run(random_ids(twin.total))


def fast(**options: Any) -> FastTwin:
    return FastTwin(tiny_model(), LENGTH, LENGTH + STEPS, FastOptions(**options))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(*logits, atol=1e-4) for logits in zip(ours, theirs, strict=True))


def test_fastkv_sums_over_rows_pools_and_sums_over_the_group() -> None:
    """The last two rows of query head 0 look at token 0 alone, and those of head 1 at token 2.

    Those of head 2 look at token 1 three times as much as at any other, and those of head 3 at all alike.
    """
    q, keys = torch.zeros(6, 4, 16), torch.zeros(6, 2, 16)
    keys[0, 0, 0], keys[2, 0, 1], q[4:, 0, 0], q[4:, 1, 1] = 1000, 1000, 1000, 1000
    keys[1, 1, 0], q[4:, 2, 0] = math.log(3), 4
    little, even = 1 / 7 + 1 / 8, 1 / 5 + 1 / 6
    worth = fast(window=2, kernel=3).worth(q, keys)
    assert torch.allclose(worth, torch.tensor([[2, 4, 2, 2], [3 * little + even] * 3 + [little + even]]))
    means = fast(window=2, kernel=3, pool="avg").worth(q, keys) * 3
    sums = [[2, 4, 2, 2], [4 * little + 2 * even, 5 * little + 3 * even, 5 * little + 3 * even, 2 * little + 2 * even]]
    assert torch.allclose(means, torch.tensor(sums))


def test_fastkv_takes_the_best_and_the_window() -> None:
    twin = fast(window=2)
    assert twin.best_and_window(torch.tensor([1.0, 5, 0, 3, 3]), 4) == [1, 3, 5, 6]


def test_fastkv_keeps_a_share_of_a_layers_rows_and_more_of_fewer() -> None:
    twin = fast(cut=2, rows=0.45, kept=0.25, window=4)
    trace = run(twin)
    assert [len(rows) for rows in twin.rows] == [50, 50, 50, 22, 22, 22]
    assert all(rows == sorted(rows) and rows[-4:] == [46, 47, 48, 49] for rows in twin.rows)
    assert [[len(head) for head in layer] for layer in trace.heads[0]] == [[12] * 2] * 6
    for step, layers in enumerate(trace.heads):
        for before, rows, after in zip(trace.heads[0], twin.rows, layers, strict=True):
            assert all({46, 47, 48, 49} <= head <= set(rows) for head in before)
            assert after == [head | set(range(LENGTH, LENGTH + step)) for head in before]


def test_fastkv_keeps_each_heads_best_and_cuts_by_their_sum() -> None:
    twin = fast(cut=2, rows=0.4, kept=16, window=4, pool="avg")
    trace = run(twin)
    assert [len(head) for layer in trace.heads[0] for head in layer] == [16] * 12
    for layer, scores in twin.scores_of.items():
        rows = torch.tensor(twin.rows[layer])
        for head, held in zip(scores, trace.heads[0][layer], strict=True):
            assert held == set(rows[head.topk(12).indices].tolist()) | {46, 47, 48, 49}
    chosen = (twin.scores_of[2][0] + twin.scores_of[2][1]).topk(16).indices.sort().values.tolist()
    assert twin.rows[3] == [*chosen, 46, 47, 48, 49]


def test_fastkv_cuts_behind_the_feed_forward_and_prefills_densely() -> None:
    twin = fast(cut=1, rows=0.4, kept=0.2)
    prefill = run(twin).logits[0]
    given = GivenTwin(tiny_model(), LENGTH, LENGTH, [set(rows) for rows in twin.rows])
    assert same([prefill], given.run(random_ids(LENGTH + STEPS)[:LENGTH]).logits)


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"kept": 51}, 50), ({"kept": 50}, 20), ({"kept": 1.0}, 20), ({"rows": 1.0}, 50), ({"window": 50}, 50)],
)
def test_fastkv_does_nothing_in_a_layer_with_less_than_it_would_keep(options: dict[str, Any], rows: int) -> None:
    twin = fast(**{"cut": 2, "rows": 0.4, "kept": 30, **options})
    run(twin)
    assert [len(some) for some in twin.rows] == [50] * 3 + [rows] * 3


def test_fastkv_is_full_attention_where_all_is_kept() -> None:
    full = run(Twin(tiny_model(), LENGTH, LENGTH + STEPS))
    assert same(run(fast(rows=1.0, kept=1.0)).logits, full.logits)
    assert not same(run(fast(rows=1.0, kept=0.5)).logits[1:], full.logits[1:])


def test_a_dense_prefill_has_the_twins_keys() -> None:
    twin, ids = Twin(tiny_model("qwen3"), LENGTH, LENGTH), random_ids(LENGTH)
    twin.run(ids)
    heads = cuts.prefill(tiny_model("qwen3"), ids)
    assert len(heads) == LAYERS
    for layer, (q, k) in enumerate(heads):
        assert torch.allclose(k, twin.keys[layer], atol=1e-4) and q.shape == (LENGTH, 4, 16)


def test_gemfilter_sums_bare_products() -> None:
    """A softmax before the sum would choose token 1; so does a louder first group."""
    q, k = torch.ones(4, 4, 1), torch.tensor([[0.0, 0], [9, -9], [0, 0], [0, 1]])[:, :, None]
    assert cuts.gem_positions(q, k, GemOptions(kept=1, kernel=1)) == [3]
    q[-1, :2] = 3
    assert cuts.gem_positions(q, k, GemOptions(kept=1, kernel=1)) == [1]


def test_gemfilter_counts_zeros_beyond_the_ends() -> None:
    q, k = torch.ones(6, 1, 1), torch.ones(6, 1, 1)
    assert cuts.gem_positions(q, k, GemOptions(kept=2, kernel=3)) == [1, 2]
    k[0], k[4] = 5, 4
    assert cuts.gem_positions(q, k, GemOptions(kept=3, kernel=3)) == [0, 1, 3]


def test_gemfilter_reads_the_chosen_tokens_as_a_new_prompt() -> None:
    model, ids = tiny_model(), random_ids(LENGTH + STEPS)
    options = GemOptions(layer=2, kept=20)
    chosen = cuts.gem_positions(*cuts.prefill(model, ids[:LENGTH])[2], options)
    assert chosen != cuts.gem_positions(*cuts.prefill(model, ids[:LENGTH])[3], options)
    trace = cuts.gem(model, ids, LENGTH, options)
    assert trace.held[-1] == [set(range(20 + STEPS))] * LAYERS
    again = Twin(model, 20, 20 + STEPS).run(torch.cat((ids[chosen], ids[LENGTH:])))
    assert same(trace.logits, again.logits)
    full = Twin(model, LENGTH, LENGTH + STEPS).run(ids)
    assert same(cuts.gem(model, ids, LENGTH, GemOptions(layer=2)).logits, full.logits)


def test_duoattentions_full_heads_have_gates_above_a_quantile() -> None:
    gates = torch.tensor([[1.5, 0.5], [0.2, 1.2]])
    assert cuts.full_heads(gates, 0.75).tolist() == [[True, False], [False, True]]
    assert cuts.full_heads(gates, 0.3).tolist() == [[True, True], [False, True]]
    assert cuts.full_heads(gates, 0).all()


def duo(prompt_len: int = 8) -> DuoTwin:
    full = torch.ones(LAYERS, 2, dtype=torch.bool)
    full[1, 0] = full[4, 1] = False
    return DuoTwin(tiny_model(), prompt_len, prompt_len + STEPS, full, sinks=2, recent=3)


def test_duoattentions_streaming_heads_see_sinks_the_recent_cache_and_themselves() -> None:
    twin = duo()
    trace = run(twin)
    everything = [set(range(8 + step)) for step in range(STEPS + 1)]
    for layer in range(LAYERS):
        for head in range(2):
            seen = [step[layer][head] for step in twin.seen]
            if (layer, head) in [(1, 0), (4, 1)]:
                assert seen == [everything[0], {0, 1, 5, 6, 7, 8}, {0, 1, 6, 7, 8, 9}, {0, 1, 7, 8, 9, 10}]
                assert trace.heads[-1][layer][head] == {0, 1, 8, 9, 10}
            else:
                assert seen == everything


def test_duoattention_prefills_densely_and_decodes_under_what_is_seen() -> None:
    twin, full = duo(), Twin(tiny_model(), 8, 8 + STEPS)
    ours, theirs = run(twin).logits, run(full).logits
    assert same(ours[:1], theirs[:1]) and not same(ours[1:], theirs[1:])


def test_duoattentions_next_chunk_sees_all_of_itself() -> None:
    twin, ids = duo(), random_ids(8 + STEPS)
    with torch.no_grad():
        twin.step(torch.arange(8), ids[:8])
        twin.step(torch.arange(8, 11), ids[8:])
    assert twin.seen[-1][1][0] == {0, 1, 5, 6, 7, 8, 9, 10}
    assert twin.trace.heads[-1][1][0] == {0, 1, 8, 9, 10}


def test_kvzip_takes_the_most_that_any_row_and_head_pays() -> None:
    """Under one key before the chunk, head 0 pays 1/4 and 1/5 to each, head 1 1/6 and 3/6, then 1/5 to each."""
    q, repeat = torch.zeros(2, 2, 4), torch.zeros(2, 1, 4)
    sinks, chunk = torch.zeros(1, 1, 4), torch.zeros(2, 1, 4)
    q[0, 1, 0], chunk[1, 0, 0] = 2, math.log(3)
    assert torch.allclose(cuts.zip_scores(q, sinks, chunk, repeat), torch.tensor([[1 / 4, 1 / 2]]))


def test_kvzip_scores_every_chunk_by_its_own_repetition() -> None:
    model, ids, more = tiny_model(), random_ids(12), random_ids(30, seed=1)
    table = cuts.zip_table(model, ids, [(range(7), more[:9]), (range(7, 12), more[9:])], sinks=2)
    assert table.shape == (LAYERS, 2, 12)
    assert (table[:, :, :2] == 1).all() and (table[:, :, 2:] < 1).all() and (table > 0).all()
    q, k = cuts.prefill(model, torch.cat((ids, more[9:])))[3]
    assert torch.equal(table[3][:, 7:], cuts.zip_scores(q[12:], k[:2], k[7:12], k[12:]))
    q, k = cuts.prefill(model, torch.cat((ids, more[:9])))[5]
    assert torch.equal(table[5][:, 2:7], cuts.zip_scores(q[12:], k[:2], k[2:7], k[12:]))


def test_kvzip_keeps_the_best_of_all_heads_and_layers() -> None:
    table = torch.tensor([[[0.1, 1.0, 0.3]], [[0.2, 0.4, 0.9]]])
    assert cuts.zip_keeps(table, 0.5).tolist() == [[[False, True, False]], [[False, True, True]]]
    assert cuts.zip_keeps(table, 0.4).sum() == 2
