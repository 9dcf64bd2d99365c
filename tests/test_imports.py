"""What is read, checked or drawn loads no model, and starts without the seconds that PyTorch takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MODEL = {"torch", "transformers"}
STEPS = {
    "LongBench's tasks": (
        "tasks.longbench.task, harness.runner.prompts",
        MODEL | {"pandas", "lm_eval", "datasets", "jieba", "rouge", "fuzzywuzzy"},
    ),
    "statistics": ("harness.statistics.bench, harness.statistics.noise", MODEL),
    "runs and their tables": (
        "harness.storage.store, harness.report.render, harness.measuring.provenance",
        MODEL | {"matplotlib.pyplot"},
    ),
    "gates": ("harness.gates.output", MODEL),
    "reports": ("harness.report.build, harness.report.compare", MODEL),
}
"""Imported one after another by one process: what is imported, and what must not be there behind it."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Step -> the unwanted modules that are loaded behind it."""
    lines = ["import json, sys, harness", "found = {}"]
    for name, (modules, heavy) in STEPS.items():
        lines += [f"import {modules}; harness.load" if "storage" in modules else f"import {modules}"]
        lines += [f"found[{name!r}] = [one for one in {sorted(heavy)} if one in sys.modules]"]
    code = "\n".join([*lines, "print(json.dumps(found))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name: set(modules) for name, modules in json.loads(done.stdout).items()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.slow
def test_imports_stay_light(step: str, loaded: dict[str, set[str]]) -> None:
    assert loaded[step] == set()


def test_methods_of_earlier_versions_find_what_they_import() -> None:
    from harness.engine import shape, step
    from harness.rows import Heads, Rows, Step
    from harness.shape import ModelShape

    assert (Heads, Rows, Step, ModelShape) == (step.Heads, step.Rows, step.Step, shape.ModelShape)
