"""What the diffusion probe asks: every arm at every layer, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness.errors import InputError, unknown
from harness.grammar import parse_item
from harness.models.load import describe, resolve_device
from harness.reproduce.diffusion.probe import Probe
from harness.reproduce.diffusion.task import DiffusionNeedle
from harness.runner.catalog import MethodSpec, parse_methods
from harness.runner.plan import Plan
from harness.runner.spec import RunSpec
from harness.statistics.paired import REFERENCE
from tasks.base import TaskContext

ARMS = {
    "needle": "drop=needle",
    "needle, hidden": "drop=needle:hide=true",
    "sentence": "drop=sentence",
    "sentence, hidden": "drop=sentence:hide=true",
    "context": "drop=context",
    "context, hidden": "drop=context:hide=true",
    "random": "drop=random",
    "question": "drop=question",
}
"""What is dropped -> options of the probe, without the layer."""

_ENGINE = {"attention": "sdpa", "engine": "stock"}
"""The same on every machine: nothing is timed, and the probe changes what decode steps see."""


def plan_probe(
    model: str, task: str, layers: Sequence[int], arms: Sequence[str], *, elsewhere: bool = False, **machine: Any
) -> Plan:
    """Checks a probe.

    Args:
        model: as in `harness run`.
        task: `diffusion` with options, in the command line's grammar.
        layers: first layers without the dropped rows; none means seven, evenly spread over the model's depth.
        arms: of `ARMS`.
        elsewhere: see `harness.runner.plan.plan`.
        machine: seed, device, dtype of `RunSpec`.

    Raises:
        InputError: whatever is wrong, in one line.
    """
    shape = describe(model)
    chosen = layers or [max(1, round(shape.layers * eighth / 8)) for eighth in range(1, 8)]
    # Arms that differ in what decode sees stand side by side, so that they share a prefill.
    labels = [f"probe:{ARMS[arm]}:layer={layer}" for layer in dict.fromkeys(chosen) for arm in arms]
    asked = {"model": model, "tasks": task, "methods": ",".join([REFERENCE, *labels])}
    return plan_of(RunSpec.read(asked | _ENGINE | machine), elsewhere=elsewhere)


def plan_of(spec: RunSpec, *, elsewhere: bool = False) -> Plan:
    """The plan of a probe that is fully specified; see `plan_probe`."""
    shape, item = describe(spec.model), parse_item(spec.tasks)
    methods = [*parse_methods(REFERENCE), *map(probe_spec, spec.methods.split(",")[1:])]
    for method in methods:
        method.check(shape)
    tasks = list(DiffusionNeedle.expand(item, TaskContext(seed=spec.seed)))
    if not elsewhere:
        resolve_device(spec.device)
    for one in tasks:
        if (one.longest_prompt() or 0) + 16 > shape.max_context:
            raise InputError(f"--lengths: {spec.model} has a context of {shape.max_context} tokens")
    return Plan(spec, shape, methods, tasks)


def probe_spec(label: str) -> MethodSpec:
    """The probe behind a label such as `probe:drop=needle:layer=9`."""
    return MethodSpec(label, Probe, Probe.Options.read("probe", parse_item(label).options))


def arms_of(text: str) -> Iterator[str]:
    """The arms of `needle/context`: without a name for hidden ones, both forms of each.

    Raises:
        InputError: an unknown arm.
    """
    for name in text.split("/"):
        found = [arm for arm in ARMS if arm.partition(",")[0] == name.strip()]
        if not found:
            raise unknown("arm", name, [arm for arm in ARMS if "," not in arm])
        yield from found
