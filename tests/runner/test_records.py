"""What a record says of a prefill that took passes beside its own."""

from __future__ import annotations

from pathlib import Path

import harness
from harness.engine.method import causal_pairs
from harness.engine.shape import ModelShape
from harness.measuring.roofline import dense_prefill_flops, prefill_flops
from tests.command import run
from tests.test_cli import random_model

SHAPE = ModelShape("llama", 6, 64, 128, 4, 2, 16, 49152, 2048)
"""Of `random_model`."""


def test_all_passes_count_beside_the_whole_prompt(tmp_path: Path) -> None:
    methods = "gemfilter:budget=64:layer=2,truncate,kvzip"
    asked = ["--methods", methods, "--tasks", "speed:lengths=256:new_tokens=2:repeats=1"]
    assert run("run", "--model", random_model(tmp_path), *asked, "--output", str(tmp_path / "run")) == 0
    records = harness.load(tmp_path / "run").set_index("method")
    assert set(records.dense_flops) == {dense_prefill_flops(SHAPE, 256)}
    rows, fed = [256] * 3 + [64] * 6, [256, 256, 0] + [64] * 6
    flops = prefill_flops(SHAPE, rows, fed, [causal_pairs(count) for count in fed])
    assert records.prefill_flops["gemfilter:budget=64:layer=2"] == flops < dense_prefill_flops(SHAPE, 256)
    # Repeating takes a request and as many rows again, which see the prompt besides themselves.
    again = [256 * 256 + causal_pairs(256)] * 6
    least = prefill_flops(SHAPE, [256] * 12, [256] * 12, [causal_pairs(256)] * 6 + again)
    assert least < records.prefill_flops["kvzip"] < 1.2 * least
    assert (records.ttft_s > 0).all() and records.kept_fraction["gemfilter:budget=64:layer=2"] == 0.25
