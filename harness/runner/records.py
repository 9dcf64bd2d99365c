"""What goes into a record, from what a request was and what was measured of it."""

from __future__ import annotations

from typing import Any

from harness.engine import promises
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.shape import ModelShape
from harness.measuring.clock import Measured
from harness.measuring.roofline import Ceilings, dense_prefill_flops, fractions, prefill_flops
from harness.runner.loaded import Cell
from harness.runner.samples import Prompt
from harness.storage.record import Record

EXCERPT = 2000
"""Characters of a prompt that a record holds: enough to see what was asked, and little beside a long prompt."""

UNTIMED: dict[str, Any] = dict.fromkeys(
    (
        "ttft_s", "tpot_s", "token_s", "e2e_s", "parts_s", "peak_memory_bytes", "kv_bytes", "kv_bytes_host",
        "extra_bytes", "ledger", "prefill_flops", "dense_flops", "decode_read_bytes", "prefill_floor_s",
        "prefill_lasting_floor_s", "decode_floor_s", "decode_bus_bytes", "decode_bus_floor_s", "device_state",
    )
)  # fmt: skip
"""The fields of a request that nobody timed, or of a method that only simulates pruning: all null."""

LATENCIES: dict[str, Any] = {name: None for name in Record.model_fields if name.endswith("_s")}
"""The fields that hold seconds, null: of a run that is there for its answers."""


def identity(cell: Cell, prompt: Prompt, late: int | None = None) -> dict[str, Any]:
    """Who was asked what; `late`: tokens that followed the prefill, if the method is not to be asked."""
    request, sample, turn = prompt.request, prompt.sample, prompt.turn
    tokens = len(request.prompt) + (turn.behind if turn is not None else 0)
    context = turn.context if turn is not None else None
    if context is None:
        context = tokens - (request.late_tokens(cell.method) if late is None else late)
    return {
        "cell": cell.hash,
        "method": cell.label,
        "task": cell.task.label,
        "sample": sample.id,
        "prompt_hash": prompt.hash,
        "prompt_tokens": tokens,
        "prompt_tokens_cut": prompt.cut,
        "context_tokens": context,
        "question": "after" if request.question_after else "prompt",
        "prompt_text": None if sample.ids else excerpt(sample.prompt),
        "question_text": excerpt(sample.question) if sample.question else None,
        "metric": cell.task.metric,
        "answers": list(sample.answers),
        "extra": {**sample.extra, **({} if turn is None else {"turn": turn.number, "turns": turn.of})},
    }


def excerpt(text: str, most: int = EXCERPT) -> str:
    """The text, or its two ends and how many characters are left out between them."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} \u2026 [{len(text) - most} characters] \u2026 {text[len(text) - most // 2 :]}"


def counts(method: Method, measured: Measured) -> dict[str, Any]:
    """Tokens that were generated, asked for, kept and computed again.

    Raises:
        BrokenPromise: the method counts in other things than numbers, or other layers than there are.
    """
    layers = method.model.shape.layers
    return {
        "new_tokens": len(measured.tokens),
        "tokens_requested": promises.by_layer("tokens_requested", method.tokens_requested(), layers, int),
        "tokens_kept": promises.by_layer("tokens_kept", measured.kept, layers),
        "tokens_recomputed": promises.count("tokens_recomputed", method.tokens_recomputed()),
    }


def times(engine: Engine, method: Method, measured: Measured, ceilings: Ceilings, context: int) -> dict[str, Any]:
    """Seconds, bytes and operations, beside what the device could do at best; `context` is the prefill's tokens."""
    shape, work = engine.context.shape, measured.work
    passed = zip(work.projected, work.fed, work.past, strict=True)
    # A pass ahead of the prefill ends with a projection: what feeds nothing did not attend either.
    pairs = [_pairs(method, rows) + rows * past if fed else 0 for rows, fed, past in passed]
    flops = prefill_flops(shape, work.projected, work.fed, pairs) if work.fed else 0
    weights, read = engine.decode_weight_bytes, promises.count("decode_bytes", measured.decode_bytes)
    near = fractions(ceilings, flops, weights, read, measured.ttft_s, measured.tpot_s, measured.bus_bytes)
    prefill: dict[str, Any] = {
        "prefill_flops": flops,
        "dense_flops": dense_prefill_flops(shape, context),
        "prefill_floor_s": near.prefill_floor_s,
        "prefill_lasting_floor_s": near.prefill_lasting_floor_s,
    }
    # A later turn of a conversation has no prefill.
    return (prefill if work.fed else dict.fromkeys(prefill)) | {
        "ttft_s": measured.ttft_s,
        "tpot_s": measured.tpot_s,
        "token_s": measured.token_s,
        "e2e_s": measured.e2e_s,
        "parts_s": measured.parts_s,
        "energy_j": measured.energy_j,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "kv_bytes": promises.count("kv_bytes", method.kv_bytes()),
        "kv_bytes_host": promises.count("kv_bytes_host", method.kv_bytes_host()),
        "extra_bytes": promises.count("extra_bytes", method.extra_bytes()),
        "decode_read_bytes": weights + read,
        "decode_floor_s": near.decode_floor_s,
        "decode_bus_bytes": None if measured.bus_bytes is None else round(measured.bus_bytes),
        "decode_bus_floor_s": near.decode_bus_floor_s,
    }


def _pairs(method: Method, rows: int) -> int:
    return promises.count("prefill_pairs", method.prefill_pairs(rows))


def unanswered(cell: Cell, prompt: Prompt, shape: ModelShape, fact: str, reason: str) -> Record:
    """The record of a request that has no answer.

    Args:
        cell: that was asked.
        prompt: what it was asked.
        shape: of the model.
        fact: `OUT_OF_MEMORY` or `FAILED`.
        reason: of that, in a line.
    """
    late = prompt.request.question if prompt.request.question_after else 0
    who, layers = identity(cell, prompt, late), [0] * shape.layers
    return Record(
        **UNTIMED | who | {"extra": who["extra"] | {fact: reason}},
        prediction=None,
        score=None,
        new_tokens=0,
        tokens_requested=layers,
        tokens_kept=layers,
        tokens_recomputed=0,
    )
