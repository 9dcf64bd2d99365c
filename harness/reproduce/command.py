"""The command group `harness reproduce`: parses and prints; exit code 1 where a claim does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.flags import OUTPUT, Accelerator, ExecutorName, RayAddress, Workers

if TYPE_CHECKING:
    from harness.executors.fleet import Fleet

app = typer.Typer(help="Measure published claims again and judge them.", no_args_is_help=True)


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
    repeats: Annotated[int, typer.Option(min=1, help="samples of each kind; 6 balance the orders")] = 6,
    slim: Annotated[str, typer.Option(help="more options of slim: score=absdot:w=4 is the paper's reading")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    attention: Annotated[str, typer.Option(help="attention kernel, as in 'harness run'")] = "auto",
    engine: Annotated[str, typer.Option(help="engine, as in 'harness run'")] = "auto",
    output: Annotated[
        Path | None, typer.Option(*OUTPUT, help="results folder; the same run in the same folder resumes")
    ] = (None),
    executor: ExecutorName = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    accelerator: Accelerator = None,
    run: Annotated[Path | None, typer.Option("--from", help="judge this recorded run; measures nothing")] = None,
    elsewhere: Annotated[
        str | None, typer.Option("--predict", help="with --from: predict the run for a device, rtx-4090 is the paper's")
    ] = None,
    undecided: Annotated[str, typer.Option(help="fail or pass where an interval straddles the paper's figure")] = (
        "fail"
    ),
) -> None:
    """SlimInfer's table, paper beside here. TTFT, end to end and prompt KV of full, lazyllm and slim."""
    from harness.executors.fleet import Fleet
    from harness.gates.tolerance import parse_undecided
    from harness.reproduce.claims import exit_code
    from harness.reproduce.sliminfer.page import write
    from harness.reproduce.sliminfer.records import read
    from harness.runner.terminal import show

    if elsewhere is not None:
        return _predict(run, elsewhere)
    choice, fleet = parse_undecided(undecided), Fleet.read(executor, workers, ray_address, accelerator)
    machine = {"device": device, "dtype": dtype, "attention": attention, "engine": engine}
    chosen = {option: value for option, value in machine.items() if value != "auto"}
    asked: dict[str, Any] = {"repeats": repeats, "slim": slim, "output": output, "fleet": fleet, **chosen}
    folder, failures = (run, []) if run else _measure(model, lengths, new_tokens, **asked)
    text, judgements, paths = write(read(folder), folder)
    show(text, paths, failures)
    if code := exit_code(judgements, choice):
        raise typer.Exit(code)


def _predict(run: Path | None, device: str) -> None:
    from harness.errors import InputError
    from harness.reproduce.sliminfer.elsewhere import predict_elsewhere
    from harness.runner.terminal import show

    if run is None:
        raise InputError("--predict works out what a recorded run would take: name it with --from")
    show(*predict_elsewhere(run, device))


def _measure(
    model: str,
    lengths: str,
    new_tokens: str,
    repeats: int,
    slim: str,
    output: Path | None,
    fleet: Fleet | None,
    **machine: Any,
) -> tuple[Path, Sequence[str]]:
    """Runs, or resumes, the paper's table; returns its folder, and a line for each method that failed."""
    from harness.models.load import describe
    from harness.reproduce.sliminfer.paper import numbers, run_options, setting_for
    from harness.runner.spec import RunSpec
    from harness.runner.terminal import run

    prompts, counts = numbers("--lengths", lengths, 16), numbers("--new-tokens", new_tokens, 1)
    options = run_options(setting_for(describe(model), prompts[-1]), prompts, counts, repeats, slim)
    spec = RunSpec.read({"model": model, **options, **machine})
    folder = output or spec.default_folder("reproduce-sliminfer")
    _, _, failures = run(spec, folder, fleet=fleet)
    return folder, failures


@app.command("diffusion")
def diffusion_command(
    model: Annotated[str, typer.Option(help="any model of 'harness run' with trained weights")] = "smollm2",
    lengths: Annotated[str, typer.Option(help="prompt tokens")] = "1024",
    depths: Annotated[str, typer.Option(help="where the number lies, as shares of the speech")] = "0.1/0.3/0.5/0.7/0.9",
    repeats: Annotated[int, typer.Option(min=1, help="prompts for each length and depth")] = 4,
    layers: Annotated[str | None, typer.Option(help="first layers without the rows; seven, evenly spread")] = None,
    arms: Annotated[str, typer.Option(help="what is dropped; each but the controls with and without hiding it")] = (
        "needle/sentence/context/random/question"
    ),
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    output: Annotated[
        Path | None, typer.Option(*OUTPUT, help="results folder; the same probe in the same folder resumes")
    ] = (None),
    executor: ExecutorName = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    accelerator: Accelerator = None,
    run: Annotated[Path | None, typer.Option("--from", help="judge this recorded probe; measures nothing")] = None,
) -> None:
    """Information diffusion: from where on rows may be dropped. And who reads those that say the answer."""
    from harness.executors.fleet import Fleet
    from harness.reproduce.diffusion.page import write
    from harness.reproduce.diffusion.plan import arms_of, plan_probe
    from harness.reproduce.diffusion.worker import ProbeWorker
    from harness.reproduce.sliminfer.paper import numbers
    from harness.runner.terminal import run_plan, show

    if run is not None:
        return show(*write(run))
    fleet = Fleet.read(executor, workers, ray_address, accelerator)
    chosen = numbers("--layers", layers, 1) if layers else ()
    task = f"diffusion:lengths={lengths}:depths={depths}:repeats={repeats}"
    machine = {"seed": seed, "device": device, "dtype": dtype}
    plan = plan_probe(model, task, chosen, list(arms_of(arms)), elsewhere=fleet is not None, **machine)
    folder = output or plan.spec.default_folder("reproduce-diffusion")
    show(*run_plan(plan, folder, ProbeWorker, write, "the same command", fleet))


@app.command("claims")
def claims_command(
    runs: Annotated[list[Path], typer.Option("--from", help="a recorded run, or a folder of runs; may be repeated")],
    output: Annotated[Path, typer.Option(*OUTPUT, help="folder of claims.md and claims.json")] = Path("results/claims"),
) -> None:
    """Every published claim of the field beside these runs. Measures nothing, judges what is there."""
    from harness.reproduce.published.judge import judge_all
    from harness.reproduce.published.page import write
    from harness.runner.terminal import show
    from harness.storage.runs import run_folders

    show(*write(judge_all(run_folders(runs)), output))
