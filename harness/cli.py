"""The command line: parses and prints, decides nothing. Bad input is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from harness.errors import InputError
from harness.predict.command import predict_command
from harness.reproduce.command import app as reproduce_app
from harness.sweep.command import sweep_command

app = typer.Typer(
    help="Accuracy and latency of long-context inference under pruning methods, beside full attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(reproduce_app, name="reproduce")
app.command("sweep")(sweep_command)
app.command("predict")(predict_command)

MethodFiles = Annotated[
    list[Path] | None, typer.Option("--method-file", help="Python file that defines methods; may be given repeatedly")
]
TaskFiles = Annotated[
    list[Path] | None, typer.Option("--task-file", help="Python file that defines tasks; may be given repeatedly")
]


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
    attention: Annotated[str, typer.Option(help="auto (the fastest here), fa3, fa2, cudnn, flash, sdpa")] = "auto",
    engine: Annotated[str, typer.Option(help="auto (the fastest here), graphed, fused, stock")] = "auto",
    memory_limit: Annotated[float | None, typer.Option(help="GiB of device memory to make do with; CUDA only")] = None,
    seed: Annotated[int, typer.Option(help="of everything generated")] = 0,
    question: Annotated[str, typer.Option(help="prompt: inside the pruned prompt; after: behind it")] = "prompt",
    parts: Annotated[bool, typer.Option(help="also time the parts of TTFT")] = False,
    ledger: Annotated[bool, typer.Option(help="also measure memory by purpose, in a pass of its own")] = False,
    noise_floor: Annotated[bool, typer.Option(help="also run full attention against itself")] = False,
    method_file: MethodFiles = None,
    task_file: TaskFiles = None,
) -> None:
    """Run methods on tasks; record accuracy, latency and memory of every request; draw a table and a plot."""
    _load_methods(method_file)
    _load_tasks(task_file)
    from harness.run.spec import RunSpec
    from harness.run.terminal import run, show

    given = {
        "model": model, "methods": methods, "tasks": tasks, "data_dir": data_dir, "limit": limit,
        "max_length": max_length, "device": device, "dtype": dtype, "attention": attention, "engine": engine,
        "memory_limit": memory_limit, "seed": seed, "question": question, "parts": parts, "ledger": ledger,
        "noise_floor": noise_floor,
    }  # fmt: skip
    spec = RunSpec.read(given)
    show(*run(spec, output or spec.default_folder()))


@app.command("resume")
def resume_command(
    folder: Annotated[Path, typer.Argument(help="results folder of a run that stopped, or is to be extended")],
    samples: Annotated[int | None, typer.Option(help="samples a task, if not as many as before")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of LongBench's jsonl files")] = None,
    model: Annotated[str | None, typer.Option(help="where the model lies; paths are not recorded")] = None,
    method_file: MethodFiles = None,
    task_file: TaskFiles = None,
) -> None:
    """Go on with a run where it stopped, or ask more samples; nothing is asked twice."""
    from harness.run.terminal import resume, show

    _load_methods(method_file)
    _load_tasks(task_file)
    show(*resume(folder, samples, data_dir, model))


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="show this method's options")] = None,
    method_file: MethodFiles = None,
) -> None:
    """List the pruning methods, or one method's options."""
    from harness.run.catalog import METHODS

    _load_methods(method_file)
    _list(METHODS, name)


@app.command("conformance")
def conformance_command(
    name: Annotated[str, typer.Argument(help="a method, with options: slim:block=32")],
    method_file: MethodFiles = None,
    layers: Annotated[int, typer.Option(min=1, help="depth of the tiny models, for options that name layers")] = 6,
) -> None:
    """Check that a method keeps every promise of the interface; exit code 1 if it breaks one."""
    from harness.conformance.kit import conformance
    from harness.run.catalog import parse_methods

    _load_methods(method_file)
    specs = parse_methods(name)
    if len(specs) != 1:
        raise InputError(f"conformance checks one method at a time, not {len(specs)}")
    report = conformance(specs[0], layers)
    _say(str(report))
    if not report.passed:
        raise typer.Exit(1)


@app.command("tasks")
def tasks_command(
    name: Annotated[str | None, typer.Argument(help="show the options of this task, or of GROUP/MEMBER")] = None,
    task_file: TaskFiles = None,
) -> None:
    """List the tasks, or one task's options and members."""
    from harness.grammar import parse_item
    from harness.run.catalog import TASKS
    from tasks.base import TaskContext

    _load_tasks(task_file)
    if name is None:
        return _list(TASKS, None)
    item = parse_item(name)
    task = TASKS.get(item.name)
    _show(name, task if item.member is None else task.of_member(item.member))
    if item.member is None and (members := task.members(TaskContext())):
        _say(f"members, as {name}/MEMBER: {', '.join(members)}")


@app.command("score")
def score_command(
    file: Annotated[Path, typer.Argument(help="JSONL with the columns pred, answers, all_classes, length")],
    task: Annotated[str, typer.Option(help="LongBench task, such as hotpotqa or trec_e")],
    fuzz: Annotated[str, typer.Option(help="engine of code similarity: difflib, levenshtein")] = "difflib",
) -> None:
    """Score a prediction file as LongBench's own script does and print one number, 0 to 100."""
    from tasks.longbench.scores import score_file

    _say(str(score_file(file, task.removeprefix("longbench/"), fuzz)))  # type: ignore[arg-type]


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval_command(context: typer.Context) -> None:
    """Run lm-eval's own command line on our engine: --model_args model=smollm2,method=slim --tasks arc_easy."""
    from tasks.lm_eval import require_lm_eval

    require_lm_eval()
    from harness.run.lm_eval import command

    command(context.args)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="results folder of a run")],
    parquet: Annotated[Path | None, typer.Option(help="file to write (needs pyarrow)")] = None,
    csv: Annotated[Path | None, typer.Option(help="file to write")] = None,
) -> None:
    """Write a run's records into one Parquet or CSV file."""
    from harness.storage.export import export

    _say(f"wrote {export(run, parquet=parquet, csv=csv)}")


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="results folders of runs")],
    out: Annotated[Path | None, typer.Option(help="folder to write to; RUN/report if none is named")] = None,
) -> None:
    """Write the tables, the plots and one HTML page of recorded runs."""
    from harness.report.build import report

    for path in report(runs, out):
        _say(f"wrote {path}")


@app.command("baseline")
def baseline_command(
    run: Annotated[Path, typer.Argument(help="results folder of a complete run")],
    name: Annotated[str, typer.Option(help="of the baseline; the file is DIR/NAME.json")],
    directory: Annotated[Path, typer.Option("--dir", help="folder of the file")] = Path("results/baselines"),
) -> None:
    """Write what 'harness check' needs to know of a run into a small file that can be reviewed."""
    from harness.gates.baseline import write_baseline

    _say(f"wrote {write_baseline(run, name, directory)}")


@app.command("check")
def check_command(
    run: Annotated[Path, typer.Argument(help="results folder of a complete run")],
    baseline: Annotated[Path, typer.Option(help="file that 'harness baseline' wrote")],
    accuracy: Annotated[
        str, typer.Option(help="points a score may fall: mean:2pt in each task, median:2pt over a method's tasks")
    ] = "mean:2pt",
    speed: Annotated[str, typer.Option(help="how much longer beside full attention a method may take")] = "ratio:5%",
    same_device: Annotated[bool, typer.Option(help="also compare seconds; on the same kind of machine alone")] = False,
    undecided: Annotated[str, typer.Option(help="fail or pass where samples are missing or too few to tell")] = "fail",
    json_file: Annotated[str | None, typer.Option("--json", help="file to write, or - for standard output")] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML to write")] = None,
) -> None:
    """Compare a run with a baseline: exit code 0 within bounds, 1 if not or undecided, 2 if they cannot be compared."""
    from harness.gates.baseline import digest_run, read_baseline
    from harness.gates.check import check
    from harness.gates.output import as_json, write_outputs
    from harness.gates.tolerance import parse_tolerance, parse_undecided

    tolerance, choice = parse_tolerance(accuracy, speed, same_device), parse_undecided(undecided)
    report = check(read_baseline(baseline), digest_run(run), tolerance)
    to_stdout = json_file == "-"
    write_outputs(report, choice, Path(json_file) if json_file and not to_stdout else None, junit)
    _say(as_json(report, choice).rstrip() if to_stdout else "\n".join(report.lines(choice)))
    if report.exit_code(choice):
        raise typer.Exit(1)


@app.command("compare")
def compare_command(
    run_a: Annotated[Path, typer.Argument(help="results folder of the run to compare with")],
    run_b: Annotated[Path, typer.Argument(help="results folder of the other run")],
    across_devices: Annotated[bool, typer.Option(help="compare speeds although the devices differ")] = False,
) -> None:
    """Say what changed between two runs: circumstances, accuracy and speed paired by sample, single answers."""
    from harness.report.compare import compare_runs, to_markdown

    _say(to_markdown(compare_runs(run_a, run_b, across_devices=across_devices)))


@app.command("env")
def env_command(
    measure: Annotated[bool, typer.Option(help="measure the ceilings now; on an idle machine, some seconds")] = False,
) -> None:
    """Print machine, software and measured ceilings as JSON: what a run records of where it was made."""
    import json
    from dataclasses import asdict

    from harness.measuring.provenance import environment
    from harness.measuring.roofline import measure_defaults, remembered_ceilings

    if measure:
        measure_defaults()
    ceilings = [asdict(one) for one in remembered_ceilings()]
    _say(json.dumps(environment() | {"ceilings": ceilings or None}, indent=2))


def _load_tasks(files: Sequence[Path] | None) -> None:
    from harness.run.catalog import TASKS

    for path in files or ():
        TASKS.load_file(path)


def _load_methods(files: Sequence[Path] | None) -> None:
    from harness.run.catalog import METHODS

    for path in files or ():
        METHODS.load_file(path)


def _list(registry: Any, name: str | None) -> None:
    if name is None:
        for known in registry.names():
            _say(f"{known:<14} {registry.get(known).summary}")
        return
    _show(name, registry.get(name))


def _show(name: str, kind: Any) -> None:
    _say(f"{name}: {kind.summary}")
    for key, field in kind.Options.model_fields.items():
        default = "required" if field.is_required() else f"default {_shown(field.default)}"
        choices = f"one of {', '.join(get_args(field.annotation))}; " if get_origin(field.annotation) is Literal else ""
        _say(f"  {key:<10} {field.description or ''} ({choices}{default})")


def _shown(default: Any) -> str:
    if default is None:
        return "by itself"
    return "/".join(map(str, default)) if isinstance(default, tuple) else str(default)


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
