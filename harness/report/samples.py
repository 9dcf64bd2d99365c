"""What the sample browser knows: full attention's answer beside each method's, and why an answer was lost."""

from __future__ import annotations

import json
import re
from typing import Any

from harness.report.maps import dropped_at, needle_spans, shares_near_needle
from harness.report.recorded import Recorded
from harness.report.summary import BASELINE
from harness.report.table import plain

_LENGTHS = (2000, 1000, 500, 250, 120, 60)
_RIGHT = 0.5
_SAME = 1e-12
_SHOWN = ("turn", "length", "depth", "bucket", "dataset", "language")


def samples(run: Recorded, limit: int) -> dict[str, Any]:
    """Everything the browser shows, as JSON values, flips first.

    Long answers are shortened, and samples at the end (where no method differs from full attention) left out, until the
    whole is at most `limit` bytes.

    Returns:
        `methods`, `tasks`: labels. `samples`: `t` task and `s` sample, `p` prompt tokens, `q` question and `i` prompt
        where they are recorded, `a` accepted answers, `x`
        facts, `r` answers: `m` index of the method, `y` text, `c` score, `f` seconds to the first token, `k` share
        kept (null where there is no answer), `o` outcome (`base`, `lost`, `gained`, `right`, `wrong`, `unscored`), `w`
        reason. `total`: how many samples the run has. `cut`: characters after which answers are shortened.
    """
    found = _samples(run)
    base = {"methods": run.methods, "tasks": run.tasks, "total": len(found)}
    for length in _LENGTHS:
        shown = [_shortened(one, length) for one in found]
        if sum(map(_size, shown)) <= limit:
            break
    while shown and sum(map(_size, shown)) > limit:
        shown = shown[: len(shown) * 3 // 4]
    return base | {"samples": shown, "cut": length}


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def outcome(score: float | None, base: float | None) -> str:
    """How an answer compares with full attention's; without one, whether it is right."""
    if score is None:
        return "unscored"
    if base is not None and abs(score - base) > _SAME:
        return "lost" if score < base else "gained"
    return "right" if score >= _RIGHT else "wrong"


def reason(score: float | None, extra: dict[str, Any], tokens: int) -> str:
    """Why an answer to a prompt of so many tokens is not right, where needle and kept positions are recorded; or ""."""
    spans = extra.get("kept_spans")
    if score is None or score >= 1 or not needle_spans(extra):
        return ""
    if extra.get("kept_shares"):
        least, layer = min((share, layer) for layer, share in enumerate(shares_near_needle(extra, tokens)))
        return f"of the needle's surroundings layer {layer} kept least: {least:.0%}"
    if not spans:
        return ""
    dropped = dropped_at(extra)
    if dropped is None:
        return f"needle kept in all {len(spans)} layers, and still wrong"
    layer, kept, size = dropped
    part = "" if kept == 0 else f" ({kept} of its {size} tokens were kept)"
    return f"needle dropped at layer {layer}{part}"


def _samples(run: Recorded) -> list[dict[str, Any]]:
    rank = {method: index for index, method in enumerate(run.methods)}
    groups: dict[tuple[str, str], list[dict[Any, Any]]] = {}
    columns = [
        "method",
        "task",
        "sample",
        "prompt_tokens",
        "context_tokens",
        "prompt_text",
        "question_text",
        "answers",
        "extra",
        "prediction",
        "score",
        "own_ttft_s",
    ]
    for row in run.contenders[[*columns, "kept_fraction"]].to_dict("records"):
        groups.setdefault((str(row["task"]), str(row["sample"])), []).append(row)
    found = [_sample(sorted(rows, key=lambda row: rank[row["method"]]), rank) for rows in groups.values()]
    # Large losses first, then gains, then what no method changed; stable, so in the order of the run.
    return sorted(found, key=lambda one: one.pop("z"))


def _sample(rows: list[dict[Any, Any]], rank: dict[str, int]) -> dict[str, Any]:
    first = rows[0]
    base = next((plain(row["score"]) for row in rows if row["method"] == BASELINE), None)
    changes = [plain(row["score"]) - base for row in rows if base is not None and plain(row["score"]) is not None]
    facts = {key: first["extra"][key] for key in _SHOWN if isinstance(first["extra"].get(key), str | int | float)}
    return {
        "t": str(first["task"]),
        "s": str(first["sample"]),
        "p": int(first["prompt_tokens"]),
        "q": plain(first["question_text"]),
        "i": plain(first["prompt_text"]),
        "a": [str(answer) for answer in first["answers"]],
        "x": facts,
        "r": [_answer(row, rank, base) for row in rows],
        "z": (round(min([0.0, *changes]), 9), -max([0.0, *changes])),
    }


def _answer(row: dict[Any, Any], rank: dict[str, int], base: float | None) -> dict[str, Any]:
    score, seconds, kept = (plain(row[name]) for name in ("score", "own_ttft_s", "kept_fraction"))
    is_base = row["method"] == BASELINE
    answer = {
        "m": rank[row["method"]],
        "y": plain(row["prediction"]),
        "c": None if score is None else round(score, 4),
        "f": None if seconds is None else float(f"{seconds:.4g}"),
        "k": None if kept is None else round(kept, 3),
        "o": outcome(score, None) if is_base else outcome(score, base),
    }
    why = reason(score, row["extra"], int(row["context_tokens"]))
    return answer | ({"w": why} if why else {})


def _shortened(sample: dict[str, Any], length: int) -> dict[str, Any]:
    answers = [one | {"y": _cut(one["y"], length)} for one in sample["r"]]
    asked = {name: _middle_cut(sample[name], length) for name in "qi" if sample[name]}
    rest = {name: value for name, value in sample.items() if name not in "qi"}
    return rest | asked | {"r": answers, "a": [_cut(answer, length) for answer in sample["a"][:8]]}


def _cut(text: str | None, length: int) -> str | None:
    if text is None or len(text) <= length:
        return text
    return f"{text[:length]} \u2026 [{len(text) - length} more characters]"


def _middle_cut(text: str, length: int) -> str:
    """Both ends: a prompt begins with what is to be done and often ends with what is asked."""
    left_out = len(text) - length
    return text if left_out <= 0 else f"{text[: length // 2]} \u2026 {text[len(text) - length // 2 :]}"


def _size(value: Any) -> int:
    return len(script_json(value).encode())
