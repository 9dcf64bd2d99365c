"""SlimInfer's claims, judged by the records of one run, and what differs from the paper's setting."""

from __future__ import annotations

import math
from collections.abc import Iterator

from harness.report import formats
from harness.reproduce.claims import Claim, Judgement, Measured, at_least, near, not_applicable
from harness.reproduce.sliminfer.paper import E2E, LLAMA, LONGEST, NEW_TOKENS, TTFT, Setting
from harness.reproduce.sliminfer.records import Line, Readings, cell_name
from harness.statistics.paired import REFERENCE
from methods.lazyllm import LazyLLM
from methods.slim import Slim

_HALF = ("bfloat16", "float16")


def judge(readings: Readings) -> list[Judgement]:
    """Every claim of the paper, in the order of its tables."""
    return [_speed(readings, TTFT), _speed(readings, E2E), *_memory(readings)]


def setting_differs(readings: Readings) -> str:
    """Why no claim of the paper speaks of this run; "" if they do."""
    setting = readings.setting
    if setting is None:
        return "the model has another shape than the paper's"
    options = readings.slim.options
    assert isinstance(options, Slim.Options)
    if (options.layers, options.budgets) != (setting.layers, setting.budgets):
        return f"slim ran with another schedule than the paper's {setting.label()}"
    return ""


def _speed(readings: Readings, claim: Claim) -> Judgement:
    reason = setting_differs(readings) or _no_speed(readings.setting, readings)
    if reason:
        return not_applicable(claim, reason)
    line = readings.line(LONGEST, readings.slim.label)
    new_tokens = NEW_TOKENS[0] if claim is TTFT else NEW_TOKENS[1]
    recorded = line is not None and cell_name(LONGEST, new_tokens) in set(readings.records["cell_name"])
    found = (line.ttft if claim is TTFT else line.e2e) if line else Measured(math.nan)
    if not recorded or math.isnan(found.value):
        return not_applicable(claim, f"no pair of records with {LONGEST} prompt and {new_tokens} new tokens")
    return at_least(claim, found)


def _no_speed(setting: Setting | None, readings: Readings) -> str:
    if setting is None or not setting.speed:
        return f"the paper's speed-ups are those of {LLAMA.name}"
    if not readings.manifest.device.startswith("cuda"):
        return "the paper's speed-ups are those of a GPU"
    return ""


def _memory(readings: Readings) -> Iterator[Judgement]:
    """The paper's table of prompt KV, full and slim, at the lengths that were run."""
    setting = readings.setting or LLAMA
    reason = setting_differs(readings)
    dtype = readings.manifest.facts.get("dtype")
    if not reason and dtype not in _HALF:
        reason = f"the paper's bytes are of 16-bit keys and values, these are {dtype}"
    for length, figures in setting.kv_gib.items():
        for label, name, figure in zip((REFERENCE, readings.slim.label), ("full", "slim"), figures, strict=True):
            claim = Claim(f"prompt KV of {name}, {length // 1024}K", figure, "GiB")
            yield _kv(claim, readings.line(length, label), reason)


def _kv(claim: Claim, line: Line | None, reason: str) -> Judgement:
    if reason or line is None or math.isnan(line.kv_bytes):
        return not_applicable(claim, reason or "this length was not run")
    return near(claim, Measured(line.kv_gib))


def differences(readings: Readings) -> list[str]:
    """In words, everything known to differ from the paper's setting."""
    manifest, facts = readings.manifest, readings.manifest.facts
    said = [_model(readings), f"GPU: the paper's is one RTX 4090; here {formats.device(manifest)}."]
    said.append(
        f"Numbers: {facts.get('dtype', 'not recorded')}. Attention kernel: {facts.get('attention', 'not recorded')}, "
        f"engine: {facts.get('engine', 'stock')}, the same for all methods; which kernels the authors used is not "
        "known, and their code was not at hand."
    )
    said.append(
        "Loop and layout: this harness's own, one prompt at a time, keys and values of each layer in one preallocated "
        "block of tokens; full attention runs in the same loop."
    )
    said.append(_slim(readings))
    said.append(_lazyllm(readings))
    said.append(
        "Prompts: running text cut to exact lengths; new tokens are generated to the last, "
        f"{readings.new_tokens[-1]} for end to end (how many the paper generates is not known)."
    )
    said.append(_accuracy(readings))
    if status := formats.status(manifest):
        said.append(f"{status} The numbers are of what was recorded.")
    return said


def _model(readings: Readings) -> str:
    setting, manifest = readings.setting, readings.manifest
    shape = f"has the shape of {setting.name}" if setting else "has another shape than the paper's models"
    weights = ", with random weights: times and bytes are real, answers mean nothing" if manifest.latency_only else ""
    return f"Model: `{manifest.model}` {shape}{weights}."


def _slim(readings: Readings) -> str:
    options = readings.slim.options
    assert isinstance(options, Slim.Options)
    published = {"score": "absdot", "w": 4, "block": 64, "unit": 8, "sink": 1, "gamma": 0.9}
    here = options.model_dump()
    apart = [f"{name}={here[name]} (paper: {value})" for name, value in published.items() if here[name] != value]
    asked = readings.slim.label.partition(":")[2] or "defaults"
    # A record tells what was asked for; what an earlier version took for granted, that version knows.
    return f"slim: asked for as `{asked}`; otherwise, by this version's defaults, {', '.join(apart) or 'as published'}."


def _lazyllm(readings: Readings) -> str:
    lazy = [method for method in readings.methods.values() if method.kind is LazyLLM]
    if not lazy:
        return "LazyLLM was not run."
    return "LazyLLM: its paper publishes no counts; here they are slim's, at slim's layers."


def _accuracy(readings: Readings) -> str:
    why = "random weights have none" if readings.manifest.latency_only else "this run times, it does not score"
    return (
        f"Accuracy (LongBench averages {LLAMA.name}: 48.08 full, 47.65 SlimInfer) is out of scope: {why}; "
        "`harness run --tasks longbench/en` measures it on trained weights."
    )
