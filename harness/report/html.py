"""The one self-contained page of a run: summary, tables, plots and a browser of samples; no request leaves it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harness.report import formats
from harness.report.advice import advice, warnings
from harness.report.recorded import Recorded
from harness.report.samples import samples, script_json
from harness.report.table import Table

PAGE_BYTES = 4_500_000
"""What pictures and samples may take together; tables are small beside them."""

_LEAST_BYTES = 500_000

_LEAD = ("accuracy_ttft", "length")
"""What stands below the table to decide by."""

CAPTIONS = {
    "accuracy_ttft": "Accuracy against time to first token; dashed: the Pareto front.",
    "turns": "Accuracy against turn; bars: paired 95 % intervals of the difference from full attention.",
    "length": "Times and memory against prompt length, medians with quartiles; dotted: roofline.",
    "parts": "Where the time to first token goes, means over samples.",
    "needles": "Needles found, suite by suite, by depth and prompt length.",
    "survival": "Which prompt tokens each layer kept.",
    "survivors": "How many prompt tokens each layer kept, mean over samples.",
    "throughput": "New tokens a second of requests that are decoded together, by how many they are.",
    "density": "Which share of query-key pairs each layer and head of a sparse prefill attended to.",
}


def page(run: Recorded, tables: Sequence[Table], images: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        run: the run.
        tables: of `harness.report.tables.tables`; the one called `decision` goes to the top.
        images: name -> SVG.
    """
    pictures = {name: picture(name, svg) for name, svg in images.items()}
    drawn = sum(len(image["source"]) for image in pictures.values())
    data = samples(run, max(_LEAST_BYTES, PAGE_BYTES - drawn))
    return environment().get_template("page.html.j2").render(
        title=run.name,
        facts=facts(run),
        advice=advice(run),
        warnings=list(warnings(run)),
        decision=next((table for table in tables if table.name == "decision"), None),
        tables=[table for table in tables if table.name != "decision"],
        lead=[pictures[name] for name in _LEAD if name in pictures],
        images=[image for name, image in pictures.items() if name not in _LEAD],
        data=Markup(script_json(data)),
        shown=len(data["samples"]),
        total=data["total"],
    )  # fmt: skip


def environment(*packages: str) -> Environment:
    """Where templates come from, these packages first; what is not said to be markup is escaped."""
    loader = ChoiceLoader([PackageLoader(package, "") for package in (*packages, "harness.report")])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def picture(name: str, svg: bytes) -> dict[str, str]:
    """`source` and `caption` of a plot."""
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return {"source": source, "caption": CAPTIONS.get(name, name)}


def facts(run: Recorded) -> list[tuple[str, str]]:
    """Where the numbers come from, so that each can be traced."""
    manifest = run.manifest
    last: dict[str, Any] = manifest.environments[-1] if manifest.environments else {}
    git, packages = last.get("git") or {}, last.get("packages") or {}
    commit = f"{git['commit'][:12]}{' (changed)' if git.get('dirty') else ''}" if git.get("commit") else ""
    found = {
        "model": manifest.model,
        "device": formats.device(manifest),
        "question": "after the context" if manifest.spec.get("question") == "after" else "in the pruned prompt",
        "records": str(len(run.records)),
        "started": manifest.started[:16].replace("T", " "),
        "torch": str(packages.get("torch") or ""),
        "code": commit,
        "run hash": manifest.run_hash,
    }
    return [(name, value) for name, value in found.items() if value]
