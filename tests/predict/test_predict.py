"""Predictions: the model gets back what it was made of, checks see where it is wrong, what is no device is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.predict.checks import check, errors_of, spread
from harness.predict.device import Device, Rates, find_device, known_devices, recognised
from harness.predict.model import fit, predict
from harness.predict.page import predictions_table, write
from harness.predict.prediction import predict_run
from harness.predict.products import Kernels, Product
from harness.predict.work import Cell, Run, known_shape, read_run
from harness.reproduce.sliminfer.elsewhere import tokens_for
from harness.storage.store import Manifest, load_manifest
from tests.command import run as command

H200, RTX = known_devices()["h200"], known_devices()["rtx-4090"]
FAST, SLOW = Rates(600e12, 4e12, 50e9, 4.4e12, 700.0), Rates(100e12, 1e12, 25e9, 1.1e12, 450.0)
STEPS, LAYERS = 63, 30
RESULTS = Path(__file__).resolve().parents[2] / "results/reference"
LLAMA = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
QWEN = ModelShape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 131072)
SMALL = ModelShape("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 131072)


def cell(method: str, length: int, rates: Rates, shape: ModelShape | None = None, **changes: float) -> Cell:
    """Work of a method that reaches 0.8 of both rates, with 10 ms of launches in a prefill and 3 ms in a step.

    Another method than `full` keeps the host busy for 20 ms.

    Of a shape: steps of the engine's own kernels, with 2 us a launch, and a chain of 5 us a layer where not `full`.
    """
    kept = 0.5 if method.startswith("slim") else 1.0
    flops, read = kept * (length * 16e9 + length**2 * 0.2e6), 15e9 + kept * length * 131072
    ttft, step = 0.01 + flops / (0.8 * rates.matrix), 0.003 + read / (0.8 * rates.memory)
    ttft = ttft if method == "full" else max(0.02, ttft)
    if shape:
        kernels, read = Kernels(shape), kept * length * shape.layers * shape.kv_bytes_per_token(2)
        step = kernels.seconds(rates.reads) + read / rates.reads + kernels.launches * 2e-6
        step += 0 if method == "full" else shape.layers * 5e-6
    known = {"beside_s": 0.0, "host_bytes": 0.0, "revived_flops": 0.0, "extra_s": 0.0, "joules": math.nan, **changes}
    decode = STEPS * step + known.pop("extra_s")
    return Cell(
        method=method, task=f"speed:{length}", length=length, steps=STEPS, layers=shape.layers if shape else LAYERS,
        engine="graphed", kernels=Kernels(shape) if shape else None, flops=flops, read_bytes=read, kv_bytes=read,
        peak_bytes=20e9, ttft_s=ttft, tpot_s=decode / STEPS, decode_s=decode, **known,
    )  # fmt: skip


def run_on(
    rates: Rates,
    lengths: tuple[int, ...] = (256, 16384, 65536, 131072),
    name: str = "made-up",
    shape: ModelShape | None = None,
) -> Run:
    cells = [cell(method, length, rates, shape) for length in lengths for method in ("full", "slim:budgets=0.5")]
    return Run(name, "random:made-up", "NVIDIA H200", H200, rates, cells)


def test_times_on_another_device_are_those_that_the_same_work_takes_there() -> None:
    known, there = run_on(FAST), run_on(SLOW)
    found = fit(known)
    for ours, theirs in zip(known.cells, there.cells, strict=True):
        times = predict(found, ours, SLOW)
        assert times.ttft_s == pytest.approx(theirs.ttft_s, rel=1e-6)
        assert times.tpot_s == pytest.approx(theirs.tpot_s, rel=1e-6)
        assert times.e2e_s == pytest.approx(theirs.e2e_s, rel=1e-6)


@pytest.mark.parametrize("shape", [QWEN, SMALL])
def test_one_run_of_the_engines_kernels_tells_the_steps_of_another_shape_on_another_device(shape: ModelShape) -> None:
    found, there = fit(run_on(FAST, (8192,), shape=LLAMA)), run_on(SLOW, shape=shape)
    for each in there.cells:
        assert predict(found, each, SLOW).tpot_s == pytest.approx(each.tpot_s, rel=1e-6)


def test_few_programs_read_slower_than_the_device_and_many_as_fast() -> None:
    down, gate_up = (Product(n, k, rows=8, tile=1024) for n, k in ((3584, 18944), (37888, 3584)))
    assert down.seconds(4.8e12) > 1.2 * down.nbytes / 4.8e12
    assert gate_up.seconds(4.8e12) == gate_up.nbytes / 4.8e12
    assert down.seconds(1e12) == down.nbytes / 1e12


def test_products_are_all_weights_of_a_layer_and_of_the_logits() -> None:
    assert sum(each.n * each.k for each in Kernels(LLAMA).layer) == LLAMA.linear_params
    assert Kernels(LLAMA).weight_bytes == 2 * (32 * LLAMA.linear_params + LLAMA.head_params)


def test_an_older_runs_shape_is_known_by_its_models_name() -> None:
    assert known_shape(load_manifest(RESULTS / "methods-h200")) == LLAMA
    assert known_shape(load_manifest(RESULTS / "field-qwen2.5-coder-1.5b-h200")) == SMALL
    assert known_shape(load_manifest(RESULTS / "cpu-needle")) is None
    told = Manifest(run_hash="", model="own", device="cuda", methods=[], tasks=[], facts={"shape": asdict(QWEN)})
    assert known_shape(told) == QWEN


def test_recorded_steps_of_two_shapes_and_longer_prompts_are_predicted_from_one_run() -> None:
    runs = [read_run(RESULTS / name) for name in ("sliminfer-h200", "sliminfer-qwen-h200", "long-h200")]
    for quantity in ("ttft", "tpot", "e2e"):
        off = np.array([abs(math.expm1(error.log)) for error in check(runs) if error.quantity == quantity])
        assert len(off) > 50
        assert np.median(off) < 0.02 and (off <= 0.1).mean() >= 0.95, quantity


def test_steps_of_another_kind_are_not_predicted() -> None:
    batch = replace(cell("full", 8192, FAST), engine="graphed, batch 16")
    times = predict(fit(run_on(FAST)), batch, FAST)
    assert math.isnan(times.tpot_s) and math.isnan(times.e2e_s) and times.ttft_s > 0


def test_joules_are_what_the_board_drew_and_at_most_its_limit_where_nobody_counted() -> None:
    known = run_on(FAST)
    assert predict(fit(known), known.cells[0], SLOW).joules == pytest.approx(
        450 * predict(fit(known), known.cells[0], SLOW).e2e_s
    )
    counted = [replace(each, joules=0.9 * 700 * each.e2e_s) for each in known.cells]
    drawn = replace(known, cells=counted)
    assert predict(fit(drawn), counted[0], SLOW).joules == pytest.approx(
        0.9 * 450 * predict(fit(known), counted[0], SLOW).e2e_s
    )
    odd = [replace(each, joules=each.joules * (1.1 if each.method == "full" else 1)) for each in counted]
    assert spread(check([replace(known, cells=odd)]), "energy", "full") == pytest.approx(0.1)
    assert not [error for error in check([known]) if error.quantity == "energy"]


def test_of_several_options_the_nearest_or_the_first_ones_speak_for_a_method() -> None:
    known = run_on(FAST, (8192,), shape=LLAMA)
    slow = replace(known.cells[1], method="slim:offload=sync", tpot_s=2 * known.cells[1].tpot_s)
    found = fit(known, [*known.cells, slow])
    asked = replace(known.cells[1], method="slim:budgets=0.25")
    assert predict(found, asked, FAST).tpot_s == pytest.approx(known.cells[1].tpot_s)
    same = replace(slow, method="slim:budgets=0.25:offload=sync")
    assert predict(found, same, FAST).tpot_s == pytest.approx(slow.tpot_s)


def test_the_host_is_seen_where_it_takes_longer_than_the_work_and_nowhere_else() -> None:
    fits = [fit(run_on(FAST, lengths)).prefill for lengths in ((256, 512, 32768), (65536, 131072))]
    short, long = (found["slim:budgets=0.5"] for found in fits)
    assert short.least == pytest.approx(0.02 / LAYERS) and long.least == 0
    assert short.factor == pytest.approx(1 / 0.8) and long.factor == pytest.approx(1 / 0.8, rel=0.01)
    assert short.at(1e-5) == pytest.approx(0.02 / LAYERS)
    assert fits[0]["full"].least == 0 and fits[0]["full"].start == short.start == pytest.approx(0.01 / LAYERS)


def test_where_a_method_only_shows_the_host_full_attention_tells_what_its_work_takes() -> None:
    short, long = run_on(FAST, (256, 512)), run_on(FAST, (32768,))
    for cell in long.cells:
        assert predict(fit(short), cell, FAST).ttft_s == pytest.approx(cell.ttft_s, rel=1e-6)


def test_a_cpu_has_no_host_beside_it_and_reads_weights_and_cache_at_a_rate_each() -> None:
    weights, known = 10e9, []
    for each in run_on(FAST, (256, 512, 1024, 16384)).cells:
        cache, ttft = each.kv_bytes - 15e9, each.flops / (0.8 * FAST.matrix)
        step = weights / (0.5 * FAST.memory) + cache / (0.2 * FAST.memory)
        known.append(replace(each, read_bytes=weights + cache, kv_bytes=cache, ttft_s=ttft, tpot_s=step))
    short = replace(run_on(FAST), cells=known[:-2], host_apart=False)
    for each in known[-2:]:
        times = predict(fit(short), each, SLOW)
        assert times.ttft_s == pytest.approx(each.flops / (0.8 * SLOW.matrix))
        assert times.tpot_s == pytest.approx(each.tpot_s * FAST.memory / SLOW.memory)
    assert all(found.least == found.start == 0 for found in fit(short).prefill.values())


@pytest.mark.parametrize(
    ("name", "times", "ratios"), [("lengths-qwen2.5-1.5b-h200", 0.06, 0.04), ("lengths-cpu", 0.04, 0.04)]
)
def test_recorded_prompts_of_2k_to_4k_are_predicted_from_512_to_1k(name: str, times: float, ratios: float) -> None:
    run = read_run(RESULTS / name)
    run = replace(run, cells=[cell for cell in run.cells if cell.length <= 4096])
    found = fit(run, [cell for cell in run.cells if cell.length <= 1024])
    errors = [*errors_of(name, found, run, [cell for cell in run.cells if cell.length > 1024])]
    for quantity in ("ttft", "tpot", "e2e", "sooner", "faster"):
        off = np.array([abs(math.expm1(error.log)) for error in errors if error.quantity == quantity])
        assert len(off) >= 10 and (off <= 0.1).mean() >= 0.9, quantity
        assert np.median(off) < (times if quantity in ("ttft", "tpot", "e2e") else ratios), quantity


def test_memory_of_the_host_is_the_devices_on_a_cpu() -> None:
    slim = next(cell for cell in read_run(RESULTS / "lengths-cpu").cells if cell.method == "slim")
    assert not slim.fetches_in_the_open and slim.host_bytes == 0


def test_what_decode_computes_again_scales_with_the_matrix_rate() -> None:
    revived, known = 1e15, run_on(FAST)
    lazy = [
        cell("lazyllm", length, FAST, revived_flops=revived, extra_s=revived / FAST.matrix * 3)
        for length in (8192, 32768)
    ]
    found = fit(known, [*known.cells, *lazy])
    times = predict(found, lazy[0], SLOW)
    step = 0.003 + lazy[0].read_bytes / (0.8 * SLOW.memory)
    assert found.revival["lazyllm"].constant == pytest.approx(0, abs=1e-9)
    assert times.e2e_s - times.ttft_s == pytest.approx(STEPS * step + 3 * revived / SLOW.matrix, rel=1e-3)


def test_what_is_fetched_in_the_open_scales_with_the_host_link() -> None:
    known = run_on(FAST)
    quest = cell("quest", 32768, FAST, host_bytes=4e9, extra_s=STEPS * 0.004)
    found = fit(known, [*known.cells, quest])
    times = predict(found, quest, SLOW)
    step = 0.003 + quest.read_bytes / (0.8 * SLOW.memory)
    assert times.tpot_s == pytest.approx(step + 2 * 0.004, rel=1e-3)


def test_a_step_is_never_shorter_than_the_transfers_beside_it() -> None:
    known = run_on(FAST)
    slim = cell("slim:budgets=0.5", 8192, FAST, host_bytes=1e9, beside_s=0.004)
    slow_link = replace(FAST, bus=FAST.bus / 4)
    assert predict(fit(known), slim, slow_link).tpot_s == pytest.approx(0.016)


def test_checks_find_nothing_where_the_model_is_right_and_the_error_where_it_is_not() -> None:
    right = check([run_on(FAST), run_on(FAST, name="other")])
    assert max(abs(error.log) for error in right) < 1e-6
    odd = run_on(FAST, name="odd")
    off = [replace(each, ttft_s=each.ttft_s * 1.3) if each.length == 131072 else each for each in odd.cells]
    wrong = check([replace(odd, cells=off)])
    assert spread(wrong, "ttft", "full") == pytest.approx(0.3, rel=0.01)
    assert spread(wrong, "sooner", "slim") == pytest.approx(0, abs=1e-6)
    assert spread([], "ttft") is None


def test_without_a_check_there_is_no_interval_and_with_one_a_ratios_is_narrow() -> None:
    known = run_on(FAST, (65536, 131072))
    bare = predict_run(known, fit(known), H200, RTX, [])[1].guesses["sooner"]
    assert math.isnan(bare.low) and math.isnan(bare.high)
    errors = check([known, run_on(SLOW, (32768, 65536), name="other")])
    slim = predict_run(known, fit(known), H200, RTX, errors)[1].guesses
    assert slim["sooner"].low <= slim["sooner"].value <= slim["sooner"].high
    assert slim["sooner"].high / slim["sooner"].low < 1.02
    # Nobody measured the card's lasting rate.
    assert slim["ttft"].high / slim["ttft"].low > 1.3


def test_memory_says_what_fits(tmp_path: Path) -> None:
    small = tmp_path / "card.yaml"
    small.write_text(
        "tiny:\n  {title: Tiny, matrix_tflops: 10, memory_gb_per_s: 100, bus_gb_per_s: 10, memory_gib: 16, power_w: 50,"
        " lasting_tflops: 9, copy_gb_per_s: 90}\n"
    )
    known, device = run_on(FAST), find_device(str(small))
    assert device.measured
    found = predict_run(known, fit(known), H200, device, check([known]))
    assert [each.fits for each in found] == [False] * len(found)
    assert all(each.fits for each in predict_run(known, fit(known), H200, H200, []))
    assert found[0].bounded
    assert found[0].guesses["energy"].value == pytest.approx(50 * found[0].guesses["e2e"].value)
    text, paths = write(known, device, found, check([known]), tmp_path / "out")
    assert "Predicted for Tiny" in text and "Nothing here was measured" in text
    assert {path.name for path in paths} >= {"predicted.md", "predicted.csv", "errors.csv", "predicted.png"}


def test_rows_name_their_task_where_nothing_else_tells_them_apart() -> None:
    load = read_run(RESULTS / "load-h200")
    table = predictions_table(load, RTX, predict_run(load, fit(load), H200, RTX, []))
    names = {tuple(cell.text for cell in row[:4]) for row in table.rows}
    assert table.head[:4] == ["task", "prompt", "new", "method"] and table.labels == 4
    assert len(names) == len(table.rows) == 4 and len({task for task, *_ in names}) == 2
    known = run_on(FAST)
    table = predictions_table(known, RTX, predict_run(known, fit(known), H200, RTX, []))
    assert table.head[:3] == ["prompt", "new", "method"] and table.labels == 3


def test_cards_are_recognised_by_their_drivers_name() -> None:
    assert recognised("NVIDIA H200") == H200
    assert recognised("NVIDIA GeForce RTX 4090") == RTX
    assert recognised("Intel Xeon (2 cores)") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a mapping"),
        ("a: [", "while parsing"),
        ("a: {title: A}", "matrix_tflops: field required"),
        ("title: A", "not a mapping"),
        ("a: {title: A, matrix_tflops: 0}", "matrix_tflops: input should be greater than"),
        ("a: {title: A, matrix_tflops: .inf}", "matrix_tflops: input should be less than"),
        ("{}", "one device is needed"),
    ],
)
def test_a_device_file_that_is_none_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "device.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as raised:
        find_device(str(path))
    assert "\n" not in str(raised.value)


def test_an_unknown_device_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'rtx-4090'"):
        find_device("rtx4090")
    with pytest.raises(InputError, match="No such file"):
        find_device("nowhere.yaml")


def test_a_recorded_run_is_predicted_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = (RESULTS / name for name in ("long-h200", "methods-h200"))
    out = tmp_path / "out"
    assert command("predict", run, "--device", "rtx-4090", "--fit", other, "--fit", run, "--output", out) == 0
    assert "# Predicted: `random:llama-3.1-8b` on GeForce RTX 4090" in capsys.readouterr().out
    assert "full" in (out / "predicted.csv").read_text()
    assert command("predict", run, "--device", "rtx-409") == 2
    assert "did you mean 'rtx-4090'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "file").touch()
    run = RESULTS / "methods-h200"
    assert command("predict", run, "--device", "h200", "--output", file / "out") == 2
    assert capsys.readouterr().err == f"harness: {file / 'out'}: Not a directory\n"


def test_a_model_that_several_devices_share_is_not_predicted_from(tmp_path: Path) -> None:
    folder = shutil.copytree(RESULTS / "long-h200", tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["spec"]["tensor_parallel"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="2 devices share the model"):
        read_run(folder)


def test_the_papers_figures_are_judged_for_its_own_cards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recorded = RESULTS / "sliminfer-h200"
    folder = tmp_path / "run"
    shutil.copytree(recorded, folder)
    assert command("reproduce", "sliminfer", "--from", folder, "--predict", "rtx-4090") == 0
    said = capsys.readouterr().out
    assert "TTFT 2.53x: less than the work would give, predicted 2.65x" in said
    assert "Without hiding transfers 1.60x" in said
    assert "predicted-rtx-4090/predicted.md" in said
    assert command("reproduce", "sliminfer", "--predict", "rtx-4090") == 2
    assert "--from" in capsys.readouterr().err


def test_as_many_tokens_as_give_a_ratio_give_it() -> None:
    known = run_on(FAST)
    full, slim = predict_run(known, fit(known), H200, RTX, [])[-2:]
    tokens = tokens_for(full, slim, 1.7)
    assert tokens is not None and tokens > 0
    times = [each.guesses["ttft"].value + tokens * each.guesses["tpot"].value for each in (full, slim)]
    assert times[0] / times[1] == pytest.approx(1.7)
    assert tokens_for(full, slim, 100.0) is None


def test_every_known_device_has_plausible_rates() -> None:
    for name, device in known_devices().items():
        assert isinstance(device, Device), name
        assert device.memory_gb_per_s >= device.bus_gb_per_s
