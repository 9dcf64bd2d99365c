"""Made-up records for tests, and runs of them on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.storage.record import Record
from harness.storage.samples import SAMPLES
from harness.storage.store import Manifest, RunStore


def save(
    folder: Path, manifest: Manifest, records: Sequence[Record], environment: dict[str, Any] | None = None
) -> Path:
    """A complete run of these records, all written at once; their labels follow those that the manifest names."""
    labels = {
        "methods": [*dict.fromkeys([*manifest.methods, *(one.method for one in records)])],
        "tasks": [*dict.fromkeys([*manifest.tasks, *(one.task for one in records)])],
    }
    with RunStore(folder, manifest.model_copy(update=labels), environment) as store:
        (folder / SAMPLES).write_text("".join(one.model_dump_json() + "\n" for one in records), encoding="utf-8")
        store.finish()
    return folder


def invented(**known: Any) -> Record:
    """A record of a right answer, two tokens to a prompt of 100; what is not said has not been measured.

    To be said are cell, method, task and sample, and the tokens requested and kept.
    """
    length = known.get("prompt_tokens", 100)
    unknown = dict.fromkeys(
        [
            "ttft_s", "tpot_s", "token_s", "parts_s", "e2e_s", "peak_memory_bytes", "kv_bytes", "kv_bytes_host",
            "extra_bytes", "ledger", "prefill_flops", "dense_flops", "decode_read_bytes", "prefill_floor_s",
            "decode_floor_s", "device_state",
        ]
    )  # fmt: skip
    values: dict[str, Any] = {
        "prompt_hash": "p", "prompt_tokens": length, "context_tokens": length, "question": "prompt", "new_tokens": 2,
        "prediction": "42", "score": 1.0, "metric": "exact match", "answers": ["42"], "tokens_recomputed": 0,
    }  # fmt: skip
    return Record(**(values | unknown | known))
