"""The command `harness capacity`: parses and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.flags import OUTPUT, MethodFiles


def capacity_command(
    methods: Annotated[str, typer.Option(help="as for harness run; full is what ratios compare with")] = (
        "full,snapkv,slim:reselect=A"
    ),
    length: Annotated[int, typer.Option(min=16, help="prompt tokens of each request")] = 32768,
    new_tokens: Annotated[int, typer.Option(min=3, help="tokens that each generates")] = 32,
    most: Annotated[int, typer.Option(min=1, help="requests to stop at, although more might fit")] = 256,
    model: Annotated[str, typer.Option(help="as for harness run")] = "smollm2",
    memory_limit: Annotated[float | None, typer.Option(help="GiB of device memory to make do with")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    attention: Annotated[str, typer.Option(help="as for harness run")] = "auto",
    engine: Annotated[str, typer.Option(help="as for harness run")] = "auto",
    seed: Annotated[int, typer.Option(help="of the texts")] = 0,
    output: Annotated[Path | None, typer.Option(*OUTPUT, help="folder of what is found; the same command goes on")] = (
        None
    ),
    accuracy: Annotated[
        Path | None, typer.Option(help="folder of a run whose scores stand, and are drawn, beside throughput")
    ] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="measure nothing, draw what --output holds")] = False,
    method_file: MethodFiles = None,
    as_json: Annotated[bool, typer.Option("--json", help="print what is found as JSON, and nothing else")] = False,
) -> None:
    """Find the largest batch that methods let a device hold. And how fast it is decoded."""
    from harness.capacity.accuracy import judged
    from harness.capacity.found import find
    from harness.capacity.held import stored
    from harness.capacity.page import write
    from harness.report.written import wrote
    from harness.runner.catalog import load_files
    from harness.runner.spec import RunSpec

    load_files(method_file)
    given = {
        "methods": methods, "tasks": f"speed:lengths={length}:new_tokens={new_tokens}:repeats=1", "model": model,
        "memory_limit": memory_limit, "device": device, "dtype": dtype, "attention": attention, "engine": engine,
        "seed": seed, "batch": 2,
    }  # fmt: skip
    spec = RunSpec.read(given)
    folder = output or spec.default_folder(f"capacity-{Path(model).name}-{length}")
    scores = None if accuracy is None else judged(accuracy)
    if redraw:
        found = stored(folder)
        labels = [held.method for held in found.methods]
    else:
        found, labels = find(spec, length, new_tokens, most, folder)
    text, paths = write(found, labels, folder, scores)
    print(found.model_dump_json(indent=2) if as_json else text)
    if not as_json:
        print(wrote(paths))
