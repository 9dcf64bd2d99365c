"""`harness reproduce claims`: the file of published claims, the word for each, the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.reproduce.claims import Claim, Measured
from harness.reproduce.published.claims_file import SPEED, Published, published, read_claims
from harness.reproduce.published.judge import judge, judge_all
from harness.reproduce.published.page import markdown
from harness.reproduce.published.readings import Reading, read_run, readings
from harness.runner.catalog import METHODS
from harness.storage.store import Manifest
from tests.command import run
from tests.recorded import invented, save
from tests.reproduce.test_sliminfer import made_up

CLAIM = Published(
    Claim("a", 2.0, "x"), "snapkv", "p", "https://a.b", "Table 1", "s", "decoding", "tpot", "llama-2-7b", 16384
)
PAPER = "- {method: a, paper: b, source: c, where: d, setting: e, claims: "
READING = Reading("r", "snapkv:budget=2048", "random:llama-2-7b", "H200", True, 16384, 1, 12, Measured(2.2, 2.1, 2.3))


def made(folder: Path, task: str, seconds: dict[str, list[float]], length: int, **known: Any) -> Path:
    """A run of Llama-2-7B's shape on a GPU, methods with their samples' TTFT and TPOT."""
    known |= {"tokens_requested": [length], "tokens_kept": [length], "prompt_tokens": length, "task": task}
    manifest = Manifest(
        run_hash="0", model="random:llama-2-7b-32k", device="cuda", latency_only=True, methods=[], tasks=[task]
    )  # fmt: skip
    return save(folder, manifest, [
        invented(cell=label, method=label, sample=str(sample), ttft_s=one, tpot_s=one, e2e_s=2 * one, **known)
        for label, times in seconds.items() for sample, one in enumerate(times)
    ])  # fmt: skip


def test_the_file_names_methods_and_sources_that_are_there() -> None:
    claims = published()
    assert {one.method for one in claims} >= {"lazyllm", "quest", "snapkv", "minference", "fastkv", "gemfilter"}
    assert {one.method for one in claims} <= set(METHODS.names())
    assert all(one.source.startswith("https://") and one.claim.figure for one in claims)
    assert sum(one.where == "Table 1" for one in claims) == 30


@pytest.mark.parametrize(
    ("low", "high", "word"), [(2.1, 2.3, "holds"), (1.5, 1.9, "does not hold"), (1.9, 2.3, "undecided")]
)
def test_an_interval_decides(low: float, high: float, word: str) -> None:
    found = judge(CLAIM, [replace(READING, found=Measured((low + high) / 2, low, high))])
    assert found.judgement.word == word and found.reading is not None


def test_a_maximum_that_is_not_reached_is_undecided() -> None:
    below = replace(READING, found=Measured(1.6, 1.5, 1.7))
    assert judge(replace(CLAIM, upto=True), [below]).judgement.word == "undecided"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model": "random:llama-3.1-8b"}, "shape of llama-2-7b"),
        ({"length": 32768}, "16,384 tokens"),
        ({"gpu": False}, "of a GPU"),
    ],
)
def test_what_is_not_the_papers_setting_is_not_judged_but_shown(changed: dict[str, object], why: str) -> None:
    found = judge(CLAIM, [replace(READING, **changed)])  # type: ignore[arg-type]
    assert found.judgement.word == "not applicable" and why in found.judgement.reason
    assert found.reading is not None and found.reading.found.value == 2.2


@pytest.mark.parametrize(
    ("demands", "why"),
    [
        ({"batch": 2}, "decodes 2 requests together"),
        ({"options": ("budget=1024", "budget=default")}, "no run has budget=1024 or budget=default"),
        ({"options": ("window=any",)}, "no run has window=any"),
    ],
)
def test_options_and_batch_are_part_of_a_setting(demands: dict[str, Any], why: str) -> None:
    found = judge(replace(CLAIM, **demands), [READING]).judgement
    assert found.word == "not applicable" and why in found.reason


@pytest.mark.parametrize("options", ["budget=2048", "budget=2048:window=default", "window=default", "budget=any"])
def test_options_that_a_label_does_not_name_are_at_their_default(options: str) -> None:
    assert judge(replace(CLAIM, options=("budget=7", options)), [READING]).judgement.word == "holds"


def test_a_reading_with_an_interval_speaks_before_longer_and_better_ones_without() -> None:
    few = replace(READING, length=16385, found=Measured(9.0))
    assert judge(CLAIM, [few, READING]).reading is READING


def test_requests_of_a_batch_are_one_measurement(tmp_path: Path) -> None:
    claim = replace(CLAIM, batch=2, options=("budget=2048",))
    full = [2.0, 2.0, 2.1, 2.1, 1.9, 1.9, 2.0, 2.0, 2.1, 2.1, 1.9, 1.9]
    times = {"full": full, "snapkv:budget=2048": [0.9] * 12}
    folder = made(tmp_path / "run", "speed:lengths=16384:new_tokens=2:repeats=12", times, 16384, batch=2)
    (found,) = readings([folder], claim)
    assert (found.samples, found.batch, found.length) == (6, 2, 16384)
    assert judge(claim, [found]).judgement.word == "holds"
    assert "16,384 tokens x 2" in found.words


def test_a_text_that_is_too_long_for_the_papers_model_says_nothing(tmp_path: Path) -> None:
    claim = replace(CLAIM, method="lazyllm", tasks=("longbench/lcc",), measure="ttft", length=None, window=4096)
    times = {"full": [2.0, 2.1, 1.9, 2.0, 2.1, 1.9], "lazyllm": [0.9] * 6}
    fits, long = (made(tmp_path / str(size), "longbench/lcc_e", times, size) for size in (3500, 5000))
    assert judge(claim, readings([fits], claim)).judgement.word == "holds"
    assert not readings([long], claim)


def test_requests_that_waited_in_a_queue_are_no_speed(tmp_path: Path) -> None:
    queue = {"arrival_s": 0, "start_s": 1, "first_token_s": 2, "last_token_s": 3, "batch_sizes": [1]}
    arrival = {"rate": 1.0, "most": 1, "replayed": False, "captures": 0, **queue}
    times = {"full": [2.0] * 6, "snapkv": [1.0] * 6}
    folder = made(tmp_path / "run", "speed:lengths=16384:rate=1", times, 16384, arrival=arrival)
    assert not readings([folder], replace(CLAIM, measure="ttft"))


def test_nothing_to_read_is_said() -> None:
    assert "no run has snapkv" in judge(CLAIM, []).judgement.reason
    assert judge(replace(CLAIM, not_here="because"), []).judgement.reason == "because"


@pytest.mark.parametrize("value", [9.0, 1.0])
def test_a_figure_whose_settings_are_kept_back_is_decided_by_nothing_and_shown_beside_the_nearest(value: float) -> None:
    claim = replace(CLAIM, not_here="the shares are not published")
    elsewhere = replace(READING, model="random:llama-3.1-8b", found=Measured(10.0, 9.9, 10.1))
    found = judge(claim, [replace(READING, found=Measured(value, value - 0.1, value + 0.1)), elsewhere])
    assert (found.judgement.word, found.judgement.reason) == ("not applicable", claim.not_here)
    assert found.reading is not None and found.reading.found.value == value


def test_settings_that_a_paper_keeps_back_are_those_of_all_its_claims(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(PAPER.replace("claims", "not_here: because, claims") + "[{what: f, measure: kv, figure: 1}]}")
    assert [one.not_here for one in read_claims(path)] == ["because"]


def test_the_page_counts_words_and_names_the_device_of_a_verdict() -> None:
    below, unread = replace(READING, found=Measured(1.6, 1.5, 1.7)), replace(CLAIM, model="xgen-7b")
    page = markdown([judge(CLAIM, [below]), judge(unread, [READING]), judge(CLAIM, [READING]), judge(CLAIM, [READING])])
    assert "Of 4 claims 2 hold, 1 does not hold, 1 is not applicable." in page
    assert "| holds on H200 |" in page and "| does not hold on H200 |" in page and "| not applicable |" in page


def test_bytes_need_no_interval() -> None:
    claim = replace(CLAIM, measure="kv")
    for value, word in ((1.97, "does not hold"), (1.99, "holds"), (2.5, "holds")):
        assert judge(claim, [replace(READING, found=Measured(value, math.nan))]).judgement.word == word


def test_the_command_judges_recorded_runs_slims_claims_among_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_up(tmp_path / "run")
    assert run("reproduce", "claims", "--from", folder, "--output", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out/claims.json").read_text())["claims"]
    assert len(data) == len(published()) + 10
    assert {one["verdict"] for one in data if one["method"] == "slim"} >= {"holds"}
    assert "Published claims" in capsys.readouterr().out
    assert run("reproduce", "claims", "--from", tmp_path / "none", "--output", tmp_path / "out") == 2


def test_a_claim_about_texts_is_read_over_all_their_lengths(tmp_path: Path) -> None:
    run = read_run(made_up(tmp_path / "run"))
    times = replace(CLAIM, method="slim", tasks=("speed:",), measure="ttft")
    by_length = [one.length for one in readings([tmp_path / "run"], replace(times, tasks=SPEED))]
    (over_all,) = {one.samples for one in readings([tmp_path / "run"], times)}
    assert len(set(by_length)) == len(run.lengths) > 1
    assert over_all == sum(run.records["method"].str.startswith("slim"))


def test_claims_of_a_run_are_the_same_with_others_beside_it(tmp_path: Path) -> None:
    one, two = made_up(tmp_path / "one"), made_up(tmp_path / "two", device="cpu")
    alone, beside = judge_all([one]), judge_all([one, two])
    assert [each.judgement.word for each in alone] == [each.judgement.word for each in beside]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PAPER + "[{what: f, measure: kv, figure: 1, batch: two}]}", "expected a number, not 'two'"),
        ("- {method: a}", "line 1: the paper has no 'paper'"),
        ("- {method: a, paper: b, source: c, where: d, setting: e, claims: [{what: f, measure: g, figure: 1}]}", "'g'"),
        (
            "- {method: a, paper: b, source: c, where: d, setting: e, claims: [{what: f, measure: kv, figure: x}]}",
            "'x'",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_claims(path)
