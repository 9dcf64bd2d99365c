"""The command line: parses and prints, decides nothing. Bad input is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from harness.errors import InputError

app = typer.Typer(
    help="Accuracy and latency of long-context inference under pruning methods, beside full attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130


@app.command("run")
def run_command(
    methods: Annotated[str, typer.Option(help="slim:budgets=0.5/0.25/0.125,lazyllm ('harness methods' lists them)")] = (
        "full,slim,lazyllm"
    ),
    tasks: Annotated[str, typer.Option(help="needle,longbench/trec_e ('harness tasks' lists them)")] = "needle",
    model: Annotated[
        str, typer.Option(help="smollm2, a hub id, a folder, a .gguf file, random:llama-3.1-8b, random:CONFIG.json")
    ] = "smollm2",
    data_dir: Annotated[Path | None, typer.Option(help="folder of LongBench's jsonl files")] = None,
    limit: Annotated[int | None, typer.Option(help="samples a task, at most")] = None,
    max_length: Annotated[int | None, typer.Option(help="prompt tokens; longer prompts lose their middle")] = None,
    output: Annotated[Path | None, typer.Option(help="results folder; the same run in the same folder resumes")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    seed: Annotated[int, typer.Option(help="of everything generated")] = 0,
    question: Annotated[str, typer.Option(help="prompt: inside the pruned prompt; after: behind it")] = "prompt",
) -> None:
    """Run methods on tasks; record accuracy, latency and memory of every request; draw a table and a plot."""
    from harness.report.render import render
    from harness.runner import plan, run

    spec = _spec(
        model=model, methods=methods, tasks=tasks, data_dir=data_dir, limit=limit, max_length=max_length,
        device=device, dtype=dtype, seed=seed, question=question,
    )  # fmt: skip
    planned = plan(spec)
    folder = output or Path("results") / f"{_slug(model)}-{spec.run_hash()[:8]}"
    interrupted = False
    try:
        run(planned, folder, _progress())
    except KeyboardInterrupt:
        interrupted = True
    _say((folder / "table.md").read_text() if (paths := render(folder)) else "nothing recorded")
    for path in paths:
        _say(f"wrote {path}")
    if interrupted:
        _complain(f"interrupted; {folder} is marked incomplete; the same command resumes it")
        raise typer.Exit(INTERRUPTED)


@app.command("methods")
def methods_command(name: Annotated[str | None, typer.Argument(help="show this method's options")] = None) -> None:
    """List the pruning methods, or one method's options."""
    from methods.registry import METHODS

    _list(METHODS, name)


@app.command("tasks")
def tasks_command(name: Annotated[str | None, typer.Argument(help="show this task's options")] = None) -> None:
    """List the tasks, or one task's options."""
    from tasks.registry import TASKS

    _list(TASKS, name)


def _list(registry: Any, name: str | None) -> None:
    if name is None:
        for known in registry.names():
            _say(f"{known:<14} {registry.get(known).summary}")
        return
    kind = registry.get(name)
    _say(f"{name}: {kind.summary}")
    for key, field in kind.Options.model_fields.items():
        _say(f"  {key:<10} {field.description or ''} (default {_shown(field.default)})")


def _shown(default: Any) -> str:
    if default is None:
        return "by the model's depth"
    return "/".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _spec(**given: Any) -> Any:
    from harness.spec import RunSpec

    try:
        return RunSpec(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option}: {first['msg']} (got {first['input']!r})") from None


def _progress() -> Any:
    from harness.progress import Progress

    return Progress(Console(stderr=True))


def _slug(model: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in Path(model).name.lower())


def _say(text: str) -> None:
    print(text, flush=True)


def _complain(text: str) -> None:
    print(f"harness: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `harness` command."""
    try:
        app(args=arguments, prog_name="harness")
    except InputError as error:
        _complain(str(error))
        sys.exit(2)
