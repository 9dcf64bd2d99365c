"""Workers that measure nothing, and so begin at once: what executors and who gives out orders do can be watched.

An order's folder says what happens: `samples` holds how many there are, how many seconds a request takes and what its
record says; `die-3` kills the process at sample 3 and is gone then, `leave-3` ends it there, `full-3` writes to a disk
that is full, `late-3` kills it when all is said, `other-HOST` gives one machine another version of a package. Every
request that is answered leaves a line in `asked`.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = ("full", "recent")
TASK = "speed:lengths=256:new_tokens=2"
SOFTWARE = {"torch": "1"}
FACTS = {"weights_hash": "w"}


def answer(line: bytes) -> Iterator[bytes]:
    """See `harness.executors.executor.Answer`."""
    for message in messages(json.loads(line)):
        yield json.dumps(message).encode()


def card(line: bytes) -> Iterator[bytes]:
    """Which GPU the process may see."""
    yield os.environ["CUDA_VISIBLE_DEVICES"].encode()


def messages(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    folder, host = Path(order["folder"]), os.environ.get("LIGHT_HOST", platform.node())
    software = SOFTWARE | ({"torch": "2"} if (folder / f"other-{host}").exists() else {})
    if order["terms"] is not None and software != order["terms"]["software"]:
        other = order["terms"]["software"]["torch"]
        reason = f"{host} is refused: torch is {software['torch']} there, and {other} where the run began"
        yield {"kind": "fault", "text": reason, "whose": "machine"}
        return
    who = {"host": host, "process": os.getpid(), "device": "none", "gpu_uuid": None, "driver": None}
    terms = {"software": software, "facts": FACTS}
    yield {"kind": "hello", "host": host, "worker": who, "environment": {"host": host}, "terms": terms}
    count, seconds, fields = json.loads((folder / "samples").read_text())
    if order["samples"] is None:
        keys = [(f"cell {method}", str(sample)) for sample in range(count) for method in METHODS]
        yield {"kind": "listing", "tasks": [(TASK, keys)]}
        return
    done = {tuple(key) for key in order["done"]}
    for sample in order["samples"][TASK]:
        if taken(folder / f"leave-{sample}"):
            return
        for method in METHODS:
            if (f"cell {method}", sample) not in done:
                yield from answered(folder, method, sample, who, seconds, fields)
    if taken(folder / f"late-{order['samples'][TASK][-1]}"):
        os.kill(os.getpid(), signal.SIGKILL)


def answered(
    folder: Path, method: str, sample: str, who: Any, seconds: float, fields: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    time.sleep(seconds)
    if taken(folder / f"die-{sample}"):
        os.kill(os.getpid(), signal.SIGKILL)
    if taken(folder / f"full-{sample}"):
        try:
            Path("/dev/full").write_text("a disk that is full")
        except OSError as error:
            yield {"kind": "fault", "text": f"{who['host']}: {error.strerror}", "whose": "machine"}
            raise SystemExit from None
    with (folder / "asked").open("a") as asked:
        asked.write(f"{method} {sample} {who['host']}\n")
    yield {"kind": "record", "record": record(method, sample, who) | fields}


def taken(path: Path) -> bool:
    """Whether the file was there; one process alone finds it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def record(method: str, sample: str, who: Any) -> dict[str, Any]:
    null = (
        "prediction", "score", "ttft_s", "tpot_s", "token_s", "parts_s", "e2e_s", "peak_memory_bytes", "kv_bytes",
        "kv_bytes_host", "extra_bytes", "ledger", "prefill_flops", "dense_flops", "decode_read_bytes",
        "prefill_floor_s", "decode_floor_s", "device_state",
    )  # fmt: skip
    said = {"cell": f"cell {method}", "method": method, "task": TASK, "sample": sample, "prompt_hash": sample}
    counts = {"prompt_tokens": 1, "context_tokens": 1, "new_tokens": 1, "tokens_recomputed": 0}
    kept = {"tokens_requested": [1], "tokens_kept": [1], "worker": who}
    return dict.fromkeys(null) | said | counts | kept | {"question": "prompt", "metric": "none", "answers": []}
