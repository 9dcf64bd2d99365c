"""Predictions: the model gets back what it was made of, checks see where it is wrong, what is no device is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.predict.checks import check, spread
from harness.predict.device import Device, Rates, find_device, known_devices, recognised
from harness.predict.model import fit, predict
from harness.predict.page import write
from harness.predict.prediction import predict_run
from harness.predict.work import Cell, Run
from harness.reproduce.sliminfer.elsewhere import tokens_for
from tests.command import run as command

H200, RTX = known_devices()["h200"], known_devices()["rtx-4090"]
FAST, SLOW = Rates(600e12, 4e12, 50e9), Rates(100e12, 1e12, 25e9)
STEPS = 63


def cell(method: str, length: int, rates: Rates, **changes: float) -> Cell:
    """Work of a method that reaches 0.8 of both rates, with 2 ms on the host and 3 ms of launches."""
    share = 0.5 if method.startswith("slim") else 1.0
    flops, read = share * (length * 16e9 + length**2 * 0.2e6), 15e9 + share * length * 131072
    ttft, step = 0.002 + flops / (0.8 * rates.matrix), 0.003 + read / (0.8 * rates.memory)
    known = {"beside_s": 0.0, "host_bytes": 0.0, "revived_flops": 0.0, "extra_s": 0.0, **changes}
    decode = STEPS * step + known.pop("extra_s")
    return Cell(
        method=method, task=f"speed:{length}", length=length, steps=STEPS, flops=flops, read_bytes=read,
        peak_bytes=20e9, ttft_s=ttft, tpot_s=decode / STEPS, decode_s=decode, watts=600.0, **known,
    )  # fmt: skip


def run_on(rates: Rates, lengths: tuple[int, ...] = (256, 16384, 65536, 131072), name: str = "made-up") -> Run:
    cells = [cell(method, length, rates) for length in lengths for method in ("full", "slim:budgets=0.5")]
    return Run(name, "random:made-up", "NVIDIA H200", H200, rates, cells)


def test_times_on_another_device_are_those_that_the_same_work_takes_there() -> None:
    known, there = run_on(FAST), run_on(SLOW)
    found = fit(known)
    for ours, theirs in zip(known.cells, there.cells, strict=True):
        times = predict(found, ours, SLOW)
        assert times.ttft_s == pytest.approx(theirs.ttft_s, rel=1e-6)
        assert times.tpot_s == pytest.approx(theirs.tpot_s, rel=1e-6)
        assert times.e2e_s == pytest.approx(theirs.e2e_s, rel=1e-6)


def test_one_length_borrows_the_constant_of_full_attention() -> None:
    known = run_on(FAST)
    some = [each for each in known.cells if each.method == "full" or each.length == 16384]
    found = fit(known, some)
    times = predict(found, known.cells[-1], FAST)
    assert times.ttft_s == pytest.approx(known.cells[-1].ttft_s, rel=1e-6)


def test_a_constant_that_explains_nothing_is_left_out() -> None:
    full = fit(run_on(FAST, (32768, 65536, 131072))).prefill["full"]
    assert full.constant == 0
    assert full.factor == pytest.approx(1 / 0.8, rel=0.01)


def test_what_decode_computes_again_scales_with_the_matrix_rate() -> None:
    revived, known = 1e15, run_on(FAST)
    lazy = [
        cell("lazyllm", length, FAST, revived_flops=revived, extra_s=revived / FAST.matrix * 3)
        for length in (8192, 32768)
    ]
    found = fit(known, [*known.cells, *lazy])
    times = predict(found, lazy[0], SLOW)
    step = 0.003 + lazy[0].read_bytes / (0.8 * SLOW.memory)
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
    slow_link = Rates(FAST.matrix, FAST.memory, FAST.bus / 4)
    assert predict(fit(known), slim, slow_link).tpot_s == pytest.approx(0.016)


def test_checks_find_nothing_where_the_model_is_right_and_the_error_where_it_is_not() -> None:
    right = check([run_on(FAST), run_on(FAST, name="other")])
    assert max(abs(error.log) for error in right) < 1e-6
    odd = run_on(FAST, name="odd")
    off = [Cell(**{**vars(each), "ttft_s": each.ttft_s * 1.3}) if each.length == 131072 else each for each in odd.cells]
    wrong = check([Run(odd.name, odd.model, odd.device, odd.gpu, odd.rates, off)])
    assert spread(wrong, "ttft", "full") == pytest.approx(0.3, rel=0.01)
    assert spread(wrong, "sooner", "slim") == pytest.approx(0, abs=1e-6)
    assert spread([], "ttft") is None


def test_without_a_check_there_is_no_interval_and_with_one_a_ratios_is_narrow() -> None:
    known = run_on(FAST, (256, 32768))
    bare = predict_run(known, fit(known), H200, RTX, [])[1].guesses["sooner"]
    assert math.isnan(bare.low) and math.isnan(bare.high)
    errors = check([known, run_on(SLOW, name="other")])
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
    assert found[0].joules == pytest.approx(50 * found[0].guesses["e2e"].value)
    text, paths = write(known, device, found, check([known]), tmp_path / "out")
    assert "Predicted for Tiny" in text and "Nothing here was measured" in text
    assert {path.name for path in paths} >= {"predicted.md", "predicted.csv", "errors.csv", "predicted.png"}


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
        ("a: {title: A, matrix_tflops: -1}", "matrix_tflops: input should be greater than 0"),
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
    run, other = (
        Path(__file__).resolve().parents[2] / "results/reference" / name for name in ("long-h200", "methods-h200")
    )
    out = tmp_path / "out"
    assert command("predict", run, "--device", "rtx-4090", "--fit", other, "--fit", run, "--output", out) == 0
    assert "# Predicted: `random:llama-3.1-8b` on GeForce RTX 4090" in capsys.readouterr().out
    assert "full" in (out / "predicted.csv").read_text()
    assert command("predict", run, "--device", "rtx-409") == 2
    assert "did you mean 'rtx-4090'" in capsys.readouterr().err


def test_the_papers_figures_are_judged_for_its_own_cards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recorded = Path(__file__).resolve().parents[2] / "results/reference/sliminfer-h200"
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
