from __future__ import annotations

import csv
import io
import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.errors import InputError
from harness.report.build import report
from harness.report.recorded import family, lengths, read
from harness.report.render import render
from harness.report.table import Cell, Table, escaped, number, to_csv, to_latex, to_markdown
from harness.report.tables import accuracy, achieved, decision, latency, memory, roofline, tables
from harness.statistics.noise import TWIN
from harness.storage.record import Record
from tasks.longbench.prompts import ENGLISH_16
from tests.report.test_report import long_records, record, write

pytestmark = pytest.mark.slow

SPEED = {"full": 1.0, "slim:budgets=0.5": 0.6, "lazyllm": 1.1}
NEEDLES = [[40, 50]]


def needle_records(samples: int = 12, layers: int = 4) -> list[Record]:
    """Two lengths, three depths: slim is sooner at both lengths and loses needles, lazyllm is slower."""
    clock = random.Random(0)

    def one(method: str, length: int, depth: float, number: int) -> Record:
        seconds = SPEED[method] * length / 1000 * math_noise(clock)
        lost = method.startswith("slim") and depth == 0.5
        kept = length // 2 if method.startswith("slim") else length
        spans = [[[0, length]]] * 2 + [[[0, 45]] if lost else [[0, kept]]] * (layers - 2)
        return record(
            method, "needle", number, prompt_tokens=length, context_tokens=length,
            ttft_s=seconds, tpot_s=seconds / 50, e2e_s=seconds * 1.2, score=0.0 if lost else 1.0,
            tokens_kept=[length] * 2 + [kept] * (layers - 2), tokens_requested=[length] * 2 + [kept] * (layers - 2),
            prefill_flops=kept * 1000, dense_flops=length * 1000, decode_floor_s=0.001,
            prefill_floor_s=seconds / 2, prefill_lasting_floor_s=seconds * 0.8,
            parts_s={"attention": seconds / 2, "feed forward": seconds / 4, "other": seconds / 4},
            extra={"length": length, "depth": depth, "needles": NEEDLES, "kept_spans": spans},
        ).model_copy(update={"sample": f"{length}-{depth}-{number}"})  # fmt: skip

    grid = itertools.product((1024, 2048), (0.1, 0.5, 0.9), range(samples), SPEED)
    return [one(method, length, depth, number) for length, depth, number, method in grid]


def math_noise(clock: random.Random) -> float:
    return 1 + clock.uniform(-0.02, 0.02)


def written(folder: Path, records: list[Record], **changes: Any) -> Path:
    """A run of these records, its labels taken from them."""
    return write(folder, records, **({"methods": [], "tasks": []} | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs") / "main", needle_records())


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_all_tables_in_three_formats(run: Path, tmp_path: Path) -> None:
    names = {path.name for path in report([run], tmp_path)}
    for table in ("decision", "accuracy", "latency", "memory", "achieved", "roofline"):
        assert {f"{table}.md", f"{table}.csv", f"{table}.tex"} <= names
    assert {path.name for path in tmp_path.iterdir()} == names


def test_decision_marks_by_paired_tests(run: Path) -> None:
    table = decision(read(run))
    full, slim, lazy = table.rows
    leads = [[table.head[index] for index, cell in enumerate(row) if cell.leads] for row in (full, slim, lazy)]
    assert leads == [["score %"], ["TTFT", "sooner"], ["score %"]]
    assert slim[2].value == pytest.approx(-100 / 3) and slim[3].value == "worse" and slim[6].value == "better"


def scored_run(folder: Path, tasks: Sequence[str], samples: int = 1) -> Path:
    """`full` is always right, `lazyllm` half of the time, in the first task always."""
    records = [
        record(method, task, n, score=float(method == "full" or task == tasks[0] or n % 2))
        for task, n, method in itertools.product(tasks, range(samples), ("full", "lazyllm"))
    ]
    return written(folder, records)


def test_means_of_families_stand_below_their_tasks_and_carry_their_own_marks(tmp_path: Path) -> None:
    names = ["longbench/trec_e", "longbench/samsum_e", "longbench/hotpotqa", "needle"]
    table = accuracy(read(scored_run(tmp_path / "run", names, 30)))
    rows = {row[0].text: row for row in table.rows}
    partial = ["LongBench-E few-shot mean, only 2 of 3 tasks", "LongBench-E flat mean, only 2 of 13 tasks"]
    assert list(rows) == [*names[:3], *partial, "mean of longbench", "needle", "mean of all"]
    for name, lazy in [(partial[0], "75.0"), ("mean of longbench", "66.7"), ("mean of all", "62.5")]:
        assert [cell.text for cell in rows[name][2:]] == ["100.0", lazy]
        assert [cell.leads for cell in rows[name][2:]] == [True, False]


@pytest.mark.usefixtures("no_pictures")
def test_the_named_means_are_in_every_table(tmp_path: Path) -> None:
    """LongBench's English-16: 15 tasks at 0 and the first, one of three of its category, at 100."""
    folder = scored_run(tmp_path / "run", [f"longbench/{name}" for name in ENGLISH_16])
    flat, weighed = "LongBench English-16 flat mean", "LongBench English-16 category mean"
    render(folder)
    report([folder])
    csv_rows = {row["mean"]: row for row in csv.DictReader((folder / "means.csv").open()) if row["method"] == "lazyllm"}
    assert float(csv_rows[flat]["score"]) == 6.25 and csv_rows[flat]["tasks"] == "16"
    assert float(csv_rows[weighed]["score"]) == pytest.approx(100 / 18, abs=1e-3) and len(csv_rows) == 8
    assert f"| {flat} | 16 | 100.0 | 6.2 |" in (folder / "table.md").read_text()
    files = [folder / "report" / f"accuracy.{ending}" for ending in ("md", "csv", "tex")]
    for path in [*files, folder / "report" / "index.html"]:
        text = path.read_text()
        assert flat in text and weighed in text and "LongBench English-16 code mean" in text
    rows = {row[0].text: row for row in accuracy(read(folder)).rows}
    assert [cell.text for cell in rows[weighed][1:]] == ["16 tasks", "100.0", "5.6"]
    assert not any(cell.leads for cell in rows[weighed])


def test_an_incomplete_mean_has_no_name_of_a_complete_one(tmp_path: Path) -> None:
    folder = scored_run(tmp_path / "run", [f"longbench/{name}" for name in ENGLISH_16[:-1]])
    render(folder)
    text = (folder / "table.md").read_text()
    assert "| LongBench English-16 flat mean, only 15 of 16 tasks | 15 |" in text
    assert "LongBench English-16 flat mean |" not in text and "category mean |" not in text
    assert not list(render(scored_run(tmp_path / "other", ["needle"])))[-1].name.startswith("means")


def test_latency_by_length(run: Path) -> None:
    table = latency(read(run))
    assert [row[:3] for row in texts(table)] == [[m, n, "36"] for n in ("1024", "2048") for m in SPEED]
    slim = table.rows[1]
    assert slim[4].value == pytest.approx(1 / 0.6, rel=0.02) and slim[4].leads
    assert slim[4].low is not None and slim[4].low < slim[4].value < (slim[4].high or 0)


def test_latency_and_decision_agree_on_the_same_requests(tmp_path: Path) -> None:
    """Two tasks of one length, one of them slower and longer; slim is soon, lazyllm as good as full attention again."""
    clock, speed = random.Random(1), {"full": 1.0, "slim": 0.6, "lazyllm": 0.99, TWIN: 0.97}
    records = [
        record(method, task, n, **dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), base * part * math_noise(clock)))
        for task, base, count in (("a", 1.0, 5), ("b", 9.0, 8))
        for n, (method, part) in itertools.product(range(count), speed.items())
    ]
    found = read(written(tmp_path / "run", records))
    for ours, theirs in zip(decision(found).rows, latency(found).rows, strict=True):
        assert ours[0] == theirs[0]
        for one, other in ((4, 3), (5, 4), (7, 5), (8, 6)):  # TTFT, sooner, TPOT, faster a token
            assert (ours[one].text, ours[one].leads) == (theirs[other].text, theirs[other].leads)
    assert [row[4].leads for row in latency(found).rows] == [False, True, False]


def test_a_length_has_the_time_a_token_of_the_tasks_that_have_one(tmp_path: Path) -> None:
    speed, one = {"full": 1.0, "slim": 0.5}, {"tpot_s": None}
    clock = random.Random(3)
    records = [
        record(method, task, n, **({"tpot_s": part * math_noise(clock)} if task == "long" else one))
        for task, n, (method, part) in itertools.product(("short", "long"), range(8), speed.items())
    ]
    full, slim = latency(read(written(tmp_path / "run", records))).rows
    assert full[5].value == pytest.approx(1.0, rel=0.02) and slim[5].value == pytest.approx(0.5, rel=0.02)
    assert slim[6].value == pytest.approx(2.0, rel=0.02) and slim[6].low is not None


def test_what_is_within_noise_is_bold_in_no_table(tmp_path: Path) -> None:
    speed = {"full": 1.0, "lazyllm": 0.99, "slow": 2.0, TWIN: 0.98}
    clock = random.Random(2)
    records = [
        record(method, "needle", n, ttft_s=part * math_noise(clock)) for n, (method, part) in
        itertools.product(range(20), speed.items())
    ]  # fmt: skip
    found = read(written(tmp_path / "run", records))
    for table, column in ((decision(found), 5), (latency(found), 4)):
        assert [row[column].leads for row in table.rows if row[0].text == "lazyllm"] == [False]


def test_too_few_samples_have_no_verdict_and_no_interval_in_any_table(tmp_path: Path) -> None:
    records = [record(method, "needle", n, ttft_s=s) for method, s in (("full", 1.0), ("slim", 0.1)) for n in range(2)]
    folder = written(tmp_path / "run", records)
    found, page = read(folder), render(folder)[2].read_text()
    assert not any(cell.leads or cell.low is not None for one in tables(found) for row in one.rows for cell in row)
    assert "undecided (too few samples)" in page and "**" not in page and "MDE " not in page.partition("times out")[2]


def test_achieved_and_roofline(run: Path) -> None:
    rows = texts(achieved(read(run)))
    assert rows[1][:5] == ["slim:budgets=0.5", "needle", "75 %", "75 %", "50 %"]
    assert texts(roofline(read(run)))[0][4:6] == ["50 %", "80 %"]


def test_attended_pairs_stand_beside_tokens_where_they_are_recorded(tmp_path: Path) -> None:
    sparse = record("ashape", "needle", 0, extra={"density": [[0.25, 0.75], [0.5, 0.1]]})
    table = achieved(read(written(tmp_path / "run", [record("full", "needle", 0), sparse])))
    assert table.head[2:6] == ["requested", "kept", "attended", "FLOPs avoided"]
    assert [row[4] for row in texts(table)] == ["-", "40 %"]
    plain = achieved(read(written(tmp_path / "plain", [record("full", "needle", 0)])))
    assert "attended" not in plain.head and "Attended" not in plain.note


def test_memory_takes_the_ledger_where_there_is_one(tmp_path: Path) -> None:
    plain = written(tmp_path / "plain", [record("full", "needle", 0)])
    assert texts(memory(read(plain))) == [["full", "128", "3.00 GiB", "0.98 KiB", "0 B", "0 B"]]
    ledger = {"weights": 1 << 30, "kv_steady": 1 << 20, "unexplained_share": 0.01}
    run = written(tmp_path / "ledger", [record("full", "needle", 0, ledger=ledger)])
    assert texts(memory(read(run)))[0] == ["full", "128", "1.00 GiB", "-", "-", "1.00 MiB", "-", "-", "-", "1 %"]


def test_the_twin_is_in_no_table(tmp_path: Path) -> None:
    run = read(write(tmp_path / "run", long_records()))
    assert not any(TWIN in cell.text for table in tables(run) for row in table.rows for cell in row)


def test_null_stays_null(tmp_path: Path) -> None:
    empty = dict.fromkeys(("score", "ttft_s", "tpot_s", "e2e_s", "peak_memory_bytes", "kv_bytes", "prediction"))
    run = read(written(tmp_path / "run", [record("full", "needle", 0, **empty)]))
    assert [table.name for table in tables(run)] == ["decision", "latency", "memory", "achieved"]
    assert to_csv(latency(run)).splitlines()[1] == "full,128,1,,,,,,"


def test_a_run_without_records_has_a_report(tmp_path: Path) -> None:
    report([write(tmp_path / "run", [])])


def test_formats_agree_and_escape() -> None:
    row = [Cell("a|b_c", "a|b_c"), Cell("1.5x [1, 2]", 1.5, 1.0, 2.0, True), Cell("-")]
    table = Table("t", "A & B", "50 %", ["method", "x", "y"], [row])
    assert "| `a\\|b_c` | **1.5x [1, 2]** | - |" in to_markdown(table)
    assert list(csv.reader(io.StringIO(to_csv(table))))[1] == ["a|b_c", "1.5", "1.0", "2.0", "True", ""]
    latex = to_latex(table)
    assert "a\\textbar{}b\\_c & \\textbf{1.5x {[}1, 2]} & - \\\\" in latex and "A \\& B" in latex
    assert latex.index("\\toprule") < latex.index("\\midrule") < latex.index("\\bottomrule")


def test_csv_cells_are_no_formulas(tmp_path: Path) -> None:
    row = [Cell("=x", "=x"), Cell("-1.5", -1.5, -2.0, -1.0), Cell("@y", "@y")]
    table = Table("t", "T", "", ["method", "x", "-1+1"], [row])
    lines = list(csv.reader(io.StringIO(to_csv(table))))
    assert lines == [["method", "x", "x low", "x high", "'-1+1"], ["'=x", "-1.5", "-2.0", "-1.0", "'@y"]]
    folder = written(tmp_path / "run", [record("=full", "@task", 0)])
    summary, comparison, *_ = render(folder)
    assert summary.read_text().splitlines()[1].startswith("'=full,'@task,1,") and comparison.is_file()


def test_latex_escapes_everything_special() -> None:
    assert escaped("\\~^%") == "\\textbackslash{}\\textasciitilde{}\\textasciicircum{}\\%"


def test_family() -> None:
    assert [family(task) for task in ("longbench/trec:limit=3", "needle:depths=0.5", "speed")] == [
        "longbench",
        "needle",
        "speed",
    ]


def test_length_is_the_nominal_one_only_where_all_of_a_task_count_tokens(tmp_path: Path) -> None:
    def lengths_of(*pairs: tuple[int, Any]) -> list[int]:
        rows = [
            record("full", "t", n, prompt_tokens=p, context_tokens=p, tokens_kept=[p, p], extra={"length": a})
            for n, (p, a) in enumerate(pairs)
        ]
        return [int(one) for one in lengths(pd.DataFrame([one.model_dump() for one in rows]))]

    assert lengths_of((1020, 1024), (2040, 2048)) == [1024, 2048]
    assert lengths_of((9000, 5500), (1500, 1507)) == [8192, 2048]
    assert lengths_of((1, None)) == [1] and lengths_of((1000, "long")) == [1024]


def test_two_runs_get_a_folder_each_and_a_page_over_both(run: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", needle_records(2))
    out = tmp_path / "out"
    paths = report([run, other], out)
    assert {path.relative_to(out).parts[0] for path in paths} == {"main", "other", "index.html", "index.md"}
    page, text = (out / "index.html").read_text(), (out / "index.md").read_text()
    for name in ("main", "other"):
        assert f'href="{name}/index.html"' in page and (out / name / "index.html").is_file()
        assert f"\n## {name}\n" in text
    assert "](" not in text, "the text is whole without the files beside it"
    assert page.count("<table") == 2 and not re.findall(r'src="(?!data:)', page)


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_of_runs_stands_for_all_of_them(tmp_path: Path) -> None:
    for name in ("b", "a/one"):
        written(tmp_path / "runs" / name, needle_records(1))
    report([tmp_path / "runs"], tmp_path / "out")
    text = (tmp_path / "out" / "index.md").read_text()
    assert text.index("## a/one\n") < text.index("## b\n")
    report([tmp_path / "runs"])
    assert (tmp_path / "runs" / "a" / "one" / "report" / "index.html").is_file()
    report([tmp_path / "runs" / "a"], tmp_path / "single")
    assert (tmp_path / "single" / "one" / "index.html").is_file() and (tmp_path / "single" / "index.html").is_file()


def test_runs_of_the_same_name_never_share_a_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same folder name"):
        report([run, run], tmp_path / "out")
    with pytest.raises(InputError, match="cannot write the report"):
        report([run], run / "samples.jsonl")
    with pytest.raises(InputError, match="it has no manifest.json"):
        report([tmp_path])


def test_numbers_for_machines_end_before_processors_differ() -> None:
    assert number(1.478078632666556, "").value == number(1.4780786326665563, "").value == 1.47807863267
    assert number(3, "").value == 3 and number(-4.999999999999999, "", -55.00000000000001).low == -55.0
