"""The command line: parses and prints, decides nothing. Bad input is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.calibrate.command import app as calibrate_app
from harness.capacity.command import capacity_command
from harness.errors import INTERRUPTED, InputError
from harness.flags import OUTPUT, Accelerator, ExecutorName, MethodFiles, RayAddress, Redo, TaskFiles, Workers
from harness.leaderboard.command import leaderboard_command
from harness.predict.command import predict_command
from harness.reproduce.command import app as reproduce_app
from harness.study.command import study_command
from harness.sweep.command import sweep_command

_NAME = 16
"""Width in characters up to which what a row is about is not folded."""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes what a file says the defaults of the command's options."""
    from harness.runner.config_file import read_config

    if path is not None:
        flags = {flag: option.name for option in context.command.params for flag in option.opts}
        names = {flag[2:]: name for flag, name in flags.items() if flag.startswith("--") and name != "config"}
        context.default_map = read_config(path, names)
    return path


@app.callback(invoke_without_command=True)
def harness_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Accuracy and latency of long-context inference under pruning methods, beside full attention."""
    if version:
        from importlib.metadata import version as installed

        _say(f"harness {installed('harness')}")
    elif context.invoked_subcommand is None:
        _say(context.get_help())


@app.command("run")
def run_command(
    methods: Annotated[str, typer.Option(help="slim:budgets=0.5/0.25/0.125,lazyllm ('harness methods' lists them)")] = (
        "full,slim,lazyllm"
    ),
    tasks: Annotated[str, typer.Option(help="needle,longbench/trec_e ('harness tasks' lists them)")] = "needle",
    model: Annotated[
        str, typer.Option(help="smollm2, a hub id, a folder, a .gguf file, random:llama-3.1-8b, random:CONFIG.json")
    ] = "smollm2",
    data_dir: Annotated[Path | None, typer.Option(help="folder of data sets")] = None,
    limit: Annotated[int | None, typer.Option(help="samples a task, at most")] = None,
    max_length: Annotated[int | None, typer.Option(help="prompt tokens; longer prompts lose their middle")] = None,
    output: Annotated[
        Path | None, typer.Option(*OUTPUT, help="results folder; the same run in the same folder resumes")
    ] = None,
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
    batch: Annotated[int, typer.Option(help="requests decoded together (docs/batch.md)")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="devices that share the model (docs/tensor-parallel.md)")] = 1,
    timing: Annotated[bool, typer.Option(help="also measure times; without, machines may be shared")] = True,
    redo: Redo = "",
    executor: ExecutorName = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    accelerator: Accelerator = None,
    method_file: MethodFiles = None,
    task_file: TaskFiles = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a summary as JSON, and nothing else")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print requests, time and memory, or what is refused; ask nothing")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_read_config, is_eager=True, help="YAML file, 'option: value' lines; the command line wins"
        ),
    ] = None,
) -> None:
    """Run methods on tasks; record every request.

    Accuracy, latency and memory of each are kept, and a table and a plot drawn.
    """
    from harness.api import prepare
    from harness.executors.fleet import Fleet
    from harness.runner.terminal import draw_json, draw_tables, run, show

    fleet = Fleet.read(executor, workers, ray_address, accelerator)
    given = {
        "model": model, "methods": methods, "tasks": tasks, "data_dir": data_dir, "limit": limit,
        "max_length": max_length, "device": device, "dtype": dtype, "attention": attention, "engine": engine,
        "memory_limit": memory_limit, "seed": seed, "question": question, "parts": parts, "ledger": ledger,
        "noise_floor": noise_floor, "batch": batch, "tensor_parallel": tensor_parallel,
        "timing": timing, "redo": redo,
    }  # fmt: skip
    spec, folder = prepare(given, output, method_file or (), task_file or ())
    if dry_run:
        from harness.runner.outlook import outlook

        if fleet is not None or as_json:
            raise InputError("--dry-run looks at this process's device, as text: no --executor, no --json")
        return _say(outlook(spec, folder))
    show(*run(spec, folder, draw_json if as_json else draw_tables, fleet))


@app.command("resume")
def resume_command(
    folder: Annotated[Path, typer.Argument(help="results folder of a run that stopped, or is to be extended")],
    samples: Annotated[int | None, typer.Option(help="samples a task, if not as many as before")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of data sets")] = None,
    model: Annotated[str | None, typer.Option(help="where the model lies; paths are not recorded")] = None,
    redo: Redo = "",
    executor: ExecutorName = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    accelerator: Accelerator = None,
    method_file: MethodFiles = None,
    task_file: TaskFiles = None,
) -> None:
    """Go on with a run that stopped, or ask it more samples. Nothing is asked twice."""
    from harness.executors.fleet import Fleet
    from harness.runner.catalog import load_files
    from harness.runner.terminal import resume, show

    fleet = Fleet.read(executor, workers, ray_address, accelerator)
    load_files(method_file, task_file)
    show(*resume(folder, samples, data_dir, model, fleet, redo))


@app.command("runs")
def runs_command(
    folder: Annotated[Path, typer.Argument(help="folder of runs, at any depth")] = Path("results"),
) -> None:
    """List the runs below a folder, newest first."""
    from harness.storage.runs import past_runs

    head = ("folder", "started (UTC)", "model", "methods", "tasks", "records", "complete")
    _table(head, [run.row() for run in past_runs(folder)])


app.command("sweep")(sweep_command)
app.command("study")(study_command)
app.command("leaderboard")(leaderboard_command)
app.command("capacity")(capacity_command)
app.command("predict")(predict_command)
app.add_typer(reproduce_app, name="reproduce")
app.add_typer(calibrate_app, name="calibrate")


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="show this method's options and their values")] = None,
    method_file: MethodFiles = None,
) -> None:
    """List the pruning methods, or the options of one. These with the values that they can take."""
    from harness.runner.catalog import METHODS, load_files

    load_files(method_file)
    if name is None:
        return _list(METHODS)
    _show(name, METHODS.get(name))


@app.command("conformance")
def conformance_command(
    name: Annotated[str, typer.Argument(help="a method, with options: slim:block=32")],
    method_file: MethodFiles = None,
    layers: Annotated[int, typer.Option(min=1, help="depth of the tiny models, for options that name layers")] = 6,
) -> None:
    """Check that a method keeps the promises of the interface. Exit code 1 if it breaks one."""
    from harness.conformance.kit import conformance
    from harness.runner.catalog import load_files, parse_methods

    load_files(method_file)
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
    """List the tasks, or the options and members of one. Options with the values that they can take."""
    from harness.grammar import parse_item
    from harness.runner.catalog import TASKS, load_files
    from tasks.base import TaskContext

    load_files(tasks=task_file)
    if name is None:
        kinds = [TASKS.get(known) for known in TASKS.names()]
        rows = [(kind.name, kind.summary, kind.metric, kind.data.source) for kind in kinds]
        return _table(("task", "what", "score", "data"), rows)
    item = parse_item(name)
    task = TASKS.get(item.name)
    _show(name, task if item.member is None else task.of_member(item.member))
    _say(f"data: {task.data.source}; languages: {task.data.languages}; licence: {task.data.licence}")
    if item.member is None and (members := task.members(TaskContext())):
        _say(f"members, as {name}/MEMBER: {', '.join(members)}")


@app.command("score")
def score_command(
    file: Annotated[Path, typer.Argument(help="JSONL in the benchmark's own layout; ruler takes a folder too")],
    task: Annotated[str, typer.Option(help="hotpotqa or trec_e of LongBench, ruler/vt, ...")],
    fuzz: Annotated[
        str | None, typer.Option(help="engine of LongBench's code similarity: difflib, levenshtein")
    ] = None,
) -> None:
    """Score a prediction file as its benchmark does: 0 to 100."""
    from harness.grammar import Item, parse_item
    from harness.runner.catalog import TASKS

    item = parse_item(task)
    if item.name not in TASKS.names():
        item = Item("longbench", item.name, item.options)
    options = item.options | ({} if fuzz is None else {"fuzz": fuzz})
    scores = TASKS.get(item.name).score_predictions(file, item._replace(options=options))
    for name, score in scores.items():
        _say(str(score) if len(scores) == 1 else f"{name:<14} {score}")


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval_command(context: typer.Context) -> None:
    """Run lm-eval's own command line on our engine. As --model_args model=smollm2,method=slim --tasks arc_easy."""
    from tasks.lm_eval import require_lm_eval

    require_lm_eval()
    from harness.runner.lm_eval import command

    command(context.args)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="results folder of a run")],
    parquet: Annotated[Path | None, typer.Option(help="file to write (needs pyarrow)")] = None,
    csv: Annotated[Path | None, typer.Option(help="file to write, or - for standard output")] = None,
) -> None:
    """Write a run's records into one Parquet or CSV file."""
    from harness.storage.export import STDOUT, export

    written = export(run, parquet=parquet, csv=csv)
    if written != STDOUT:
        _say(f"wrote {written}")


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="results folders of runs")],
    output: Annotated[
        Path | None, typer.Option(*OUTPUT, help="folder to write to; RUN/report if none is named")
    ] = None,
    slo: Annotated[str | None, typer.Option(help="also count the requests within ttft=2s,tpot=50ms,e2e=5s")] = None,
) -> None:
    """Write tables, plots and one HTML page of recorded runs."""
    from harness.report.build import report
    from harness.report.slo import parse_slo
    from harness.report.written import wrote

    limits = [] if slo is None else parse_slo(slo)
    _say(wrote(report(runs, output, limits)))


@app.command("baseline")
def baseline_command(
    run: Annotated[Path, typer.Argument(help="results folder of a complete run")],
    name: Annotated[str, typer.Option(help="of the baseline; the file is OUTPUT/NAME.json")],
    output: Annotated[Path, typer.Option(*OUTPUT, "--dir", help="folder of the file")] = Path("results/baselines"),
) -> None:
    """Write what 'harness check' needs to know of a run. The file is small, and can be reviewed."""
    from harness.gates.baseline import write_baseline

    _say(f"wrote {write_baseline(run, name, output)}")


@app.command("check")
def check_command(
    run: Annotated[Path, typer.Argument(help="results folder of a complete run")],
    baseline: Annotated[Path, typer.Option(help="file that 'harness baseline' wrote")],
    accuracy: Annotated[
        str, typer.Option(help="points a score may fall: mean:2pt in each task, median:2pt over a method's tasks")
    ] = "mean:2pt",
    speed: Annotated[str, typer.Option(help="how much longer beside full attention a method may take")] = "ratio:5%",
    energy: Annotated[str | None, typer.Option(help="also bound joules beside full attention: ratio:10%")] = None,
    tail: Annotated[str | None, typer.Option(help="also bound p90 and p99 of a request's gaps: ratio:20%")] = None,
    same_device: Annotated[bool, typer.Option(help="also compare seconds; on the same kind of machine alone")] = False,
    undecided: Annotated[str, typer.Option(help="fail or pass where samples are missing or too few to tell")] = "fail",
    json_file: Annotated[str | None, typer.Option("--json", help="file to write, or - for standard output")] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML to write")] = None,
) -> None:
    """Compare a run with a baseline, for CI.

    Exit code 0 within bounds, 1 if not or undecided, 2 if they cannot be compared.
    """
    from harness.gates.baseline import digest_run, read_baseline
    from harness.gates.check import check
    from harness.gates.output import as_json, write_outputs
    from harness.gates.tolerance import parse_tolerance, parse_undecided

    tolerance, choice = parse_tolerance(accuracy, speed, same_device, energy, tail), parse_undecided(undecided)
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
    """Say what changed between two runs. Circumstances, accuracy and speed paired by sample, single answers."""
    from harness.report.compare import compare_runs, to_markdown

    _say(to_markdown(compare_runs(run_a, run_b, across_devices=across_devices)))


@app.command("env")
def env_command(
    measure: Annotated[bool, typer.Option(help="measure the ceilings now; on an idle machine, some seconds")] = False,
) -> None:
    """Print machine, software and measured ceilings as JSON. A run records that of where it was made."""
    import json
    from dataclasses import asdict

    from harness.measuring.provenance import environment
    from harness.measuring.roofline import measure_defaults, remembered_ceilings

    if measure:
        measure_defaults()
    ceilings = [asdict(one) for one in remembered_ceilings()]
    _say(json.dumps(environment() | {"ceilings": ceilings or None}, indent=2))


def _list(registry: Any) -> None:
    for name in registry.names():
        _say(f"{name:<14} {registry.get(name).summary}")


def _show(name: str, kind: Any) -> None:
    from harness.option_help import describe

    _say(f"{name}: {kind.summary}")
    if options := describe(kind.Options):
        _table(("option", "values", "default", "meaning"), options)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Fits a terminal, where short names stay whole; elsewhere a row is a line, whatever its width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    named = max((len(row[0]) for row in rows), default=0)
    table.add_column(head[0], overflow="fold", min_width=min(named, _NAME))
    for name in head[1:]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 10_000, highlight=False).print(table)


def _say(text: str) -> None:
    print(text, flush=True)


def _complain(text: str) -> None:
    print(f"harness: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `harness` command."""
    try:
        code = app(args=arguments, prog_name="harness", standalone_mode=False)
        if code == INTERRUPTED:  # a command that has told of Ctrl-C itself does not come back
            _complain("interrupted")
        sys.exit(code)
    except (InputError, typer.TyperException) as error:
        reason = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        _complain(" ".join(reason.split()))
        sys.exit(2)
    except OSError as error:  # what a disk refuses to whoever draws; records are written by what tells it itself
        if error.strerror is None:
            raise
        _complain(f"{error.filename or 'a file cannot be written'}: {error.strerror}")
        sys.exit(2)


if __name__ == "__main__":
    main()
