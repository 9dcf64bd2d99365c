"""The command group `harness reproduce`: parses and prints; exit code 1 where a claim does not hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness.errors import InputError

app = typer.Typer(help="Measure published claims again and judge them.", no_args_is_help=True)

INTERRUPTED = 130


@app.callback()
def group() -> None:
    """Measure published claims again and judge them."""


@app.command("sliminfer")
def sliminfer_command(
    model: Annotated[
        str, typer.Option(help="random:llama-3.1-8b, random:qwen2.5-7b, or any model of 'harness run'")
    ] = "random:llama-3.1-8b",
    lengths: Annotated[str, typer.Option(help="prompt tokens")] = "8192/16384/24576/32768",
    new_tokens: Annotated[str, typer.Option(help="tokens to generate: fewest for TTFT, most for end to end")] = "1,64",
    repeats: Annotated[int, typer.Option(min=1, help="samples for each length and number of new tokens")] = 7,
    slim: Annotated[str, typer.Option(help="more options of slim: score=absdot:w=4 is the paper's reading")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    output: Annotated[Path | None, typer.Option(help="results folder; the same run in the same folder resumes")] = None,
    run: Annotated[Path | None, typer.Option("--from", help="judge this recorded run; measures nothing")] = None,
    undecided: Annotated[str, typer.Option(help="fail or pass where an interval straddles the paper's figure")] = (
        "fail"
    ),
) -> None:
    """SlimInfer's table: TTFT, end to end and prompt KV of full, lazyllm and slim; paper beside here."""
    from harness.bounds import parse_undecided
    from harness.reproduce.claims import exit_code
    from harness.reproduce.sliminfer_page import write
    from harness.reproduce.sliminfer_records import read

    choice = parse_undecided(undecided)
    folder = run or _measure(model, lengths, new_tokens, repeats, slim, output, device=device, dtype=dtype)
    text, judgements, paths = write(read(folder), folder)
    _say(text)
    for path in paths:
        _say(f"wrote {path}")
    if code := exit_code(judgements, choice):
        raise typer.Exit(code)


def _measure(
    model: str, lengths: str, new_tokens: str, repeats: int, slim: str, output: Path | None, **machine: Any
) -> Path:
    """Runs, or resumes, the paper's table and returns its folder."""
    from harness.models import describe
    from harness.reproduce.sliminfer import numbers, run_options, setting_for

    prompts, counts = numbers("--lengths", lengths, 16), numbers("--new-tokens", new_tokens, 1)
    options = run_options(setting_for(describe(model), prompts[-1]), prompts, counts, repeats, slim)
    return execute({"model": model, **options, **machine}, output, "reproduce-sliminfer")


def execute(given: dict[str, Any], output: Path | None, name: str) -> Path:
    """Runs, or resumes, a specification, writes its table, and returns its folder.

    Args:
        given: of `harness.spec.RunSpec`.
        output: the folder; None for one in `results/` that bears `name`.
        name: what is reproduced.

    Raises:
        InputError: bad input. typer.Exit: interrupted.
    """
    from harness.progress import Progress
    from harness.report.render import render
    from harness.runner import plan, run

    spec = read_spec(given)
    folder = output or Path("results") / f"{name}-{spec.run_hash()[:8]}"
    try:
        run(plan(spec), folder, Progress(Console(stderr=True)))
    except KeyboardInterrupt:
        print(f"harness: interrupted; the same command goes on in {folder}", file=sys.stderr, flush=True)
        raise typer.Exit(INTERRUPTED) from None
    render(folder)
    return folder


def read_spec(given: dict[str, Any]) -> Any:
    """The specification of a run.

    Raises:
        InputError: a value that does not fit.
    """
    from pydantic import ValidationError

    from harness.spec import RunSpec

    try:
        return RunSpec(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--{first['loc'][0]}: {first['msg']} (got {first['input']!r})") from None


def _say(text: str) -> None:
    print(text, flush=True)
