"""`harness leaderboard`: what goes together, losses and ranks with intervals, who serves which need, the pages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.leaderboard.board import Board
from harness.leaderboard.effects import Found, loss, ranks, ratio, wins_from
from harness.leaderboard.entries import read_entries
from harness.leaderboard.frame import paired
from harness.leaderboard.kinds import kind, suite
from harness.leaderboard.needs import NEEDS, _tells, answers, missing, so_far, word
from harness.leaderboard.tables import needs_table
from harness.report.table import to_markdown
from harness.storage.record import Record
from harness.storage.samples import SAMPLES
from harness.storage.store import Manifest, load_manifest
from tests.command import run
from tests.recorded import invented, save

METHODS = {"full": (1.0, 1.0, 1.0), "good": (1.0, 2.0, 4.0), "fast": (0.2, 4.0, 4.0), "random": (0.9, 9.0, 9.0)}
"""Share of right answers, times faster, times smaller."""


def record(method: str, task: str, number: int, length: int, **changes: Any) -> Record:
    right, faster, smaller = METHODS[method]
    seconds = (1 + 0.01 * number) / (faster if length > 1024 else 0.5 if method != "full" else 1)
    seconds *= 1 + 0.001 * (number * (3 if method == "full" else 5) % 7)
    values: dict[str, Any] = {
        "cell": f"{method} {task}", "method": method, "task": task, "sample": str(number),
        "prompt_hash": f"{number}", "prompt_tokens": length, "prediction": "a", "answers": ["a"],
        "score": float(number % 10 < 10 * right), "ttft_s": seconds, "tpot_s": seconds / 10, "e2e_s": 2 * seconds,
        "peak_memory_bytes": 10**6, "kv_bytes": int(10**5 / smaller), "kv_bytes_host": 0, "extra_bytes": 0,
        "tokens_requested": [length], "tokens_kept": [length / smaller], "extra": {"length": length},
    }  # fmt: skip
    return invented(**(values | changes))


def made(
    folder: Path,
    *,
    source: str = "1",
    lengths: tuple[int, ...] = (1024, 4096),
    samples: int = 20,
    batch: int | None = None,
    **changes: Any,
) -> Path:
    """A run of four methods with so many samples of each length."""
    tasks = {f"needle:lengths={length}": length for length in lengths}
    facts = {"weights_hash": "w", "dtype": "bfloat16", "task_sources": dict.fromkeys(tasks, source)}
    given = {"run_hash": folder.name, "model": "m", "device": "cpu", "spec": {"question": "prompt"}, "facts": facts}
    manifest = Manifest(**given | {"methods": list(METHODS), "tasks": list(tasks)} | changes)
    records = [
        record(method, task, number, length, batch=batch)
        for task, length in tasks.items()
        for number in range(samples)
        for method in METHODS
    ]
    return save(folder, manifest, records)


def board(*folders: Path) -> Board:
    return Board(read_entries(folders)[0])


def test_who_serves_a_need_loses_little_and_is_no_control(tmp_path: Path) -> None:
    found = answers(board(made(tmp_path / "a")), points=10)
    first = {one.need.title: one for one in reversed(found)}
    quick = first["A short time to first token"]
    assert (quick.entrant, quick.length, quick.standing, quick.starts) == ("good", 4096, "shown", "4,096")
    assert quick.gain.value == pytest.approx(2, rel=0.01) and quick.gain.low > 1.9
    assert {one.entrant for one in found} == {"good"}
    assert "Several questions about one text" not in first


def test_with_a_narrow_margin_nothing_is_shown(tmp_path: Path) -> None:
    (quick, *_) = answers(board(made(tmp_path / "a")), points=3)
    assert quick.standing == "open" and quick.sureness(3) == "undecided: may lose 7.5 points"  # 3 of 40 unseen


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Found(-1, -2.5, 0.5, 90), "shown"),
        (Found(-1, -4, 2, 90), "open"),
        (Found(-4, -8, 0, 90), "doubtful"),
        (Found(-9, -12, -6, 90), "loses"),
        (None, "unknown"),
    ],
)
def test_what_is_known_of_a_loss(found: Found | None, said: str) -> None:
    assert word(found, 3) == said


@pytest.mark.parametrize(
    ("found", "tells"),
    [
        (Found(-2.5, -10, 5, 40), True),
        (Found(0, -50, 50, 6), False),  # six prompts, and nothing known
        (Found(-50, -80, -20, 10), True),  # as wide, but a loss from end to end
        (Found(0), False),
    ],
)
def test_an_interval_that_spans_half_of_all_losses_tells_nothing(found: Found, tells: bool) -> None:
    assert _tells(found, 3) == tells


def test_few_samples_name_nobody_but_say_what_is_missing(tmp_path: Path) -> None:
    few = board(made(tmp_path / "a", samples=2))
    assert answers(few, points=10) == []
    assert missing(few, NEEDS[0], points=10).startswith("losses are of 4 samples at most; 6 are")
    assert missing(few, NEEDS[3], points=10) == "nothing scored with the question after the context"
    # Enough for losses, of six lengths, too few at one length for times; bytes need no interval.
    lengths = tuple(1024 * 2**i for i in range(6))
    some = board(made(tmp_path / "b", samples=4, lengths=lengths))
    assert missing(some, NEEDS[0], points=10) == "TTFT is of 4 pairs at most, 6 are the fewest for an interval"
    ahead = so_far(some, NEEDS[0], points=10)
    assert ahead is not None and ahead.entrant == "good" and ahead.gain.value == pytest.approx(2, rel=0.01)
    assert so_far(few, NEEDS[0], points=10) is None and so_far(some, NEEDS[1], points=10) is None
    assert "`good (so far)`" in to_markdown(needs_table(some, points=10))
    assert {one.need.measure for one in answers(some, points=10)} == {"kv"}


def test_losses_and_times_are_each_of_one_model(tmp_path: Path) -> None:
    """The smaller run of another model, and its times, answer nothing."""
    other = made(tmp_path / "b", model="other", lengths=(65536,))
    found = answers(board(made(tmp_path / "a"), other), points=10)
    assert found and {one.length for one in found} == {4096}


def test_who_is_less_sure_is_named_for_winning_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "fast", (0.9, 4.0, 8.0))
    monkeypatch.setitem(METHODS, "random", (0.9, 1.5, 2.0))
    found = [(one.entrant, one.standing) for one in answers(board(made(tmp_path / "a")), points=10)]
    assert found[:2] == [("good", "shown"), ("fast", "open")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other"}, "other model (other beside m)"),
        ({"facts": {"weights_hash": "w", "dtype": "float32"}}, "other numbers (float32 beside bfloat16)"),
        ({"spec": {"question": "after"}}, "other protocol (after beside prompt)"),
    ],
)
def test_what_cannot_be_compared_stands_apart_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    both = board(made(tmp_path / "a"), made(tmp_path / "b", **changes))
    assert len(both.sections) == 2 and len(both.times) == 2
    assert any(said in line for line in both.notes())
    assert {len(section.group.entries) for section in both.sections} == {1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cuda"}, "other device (cuda beside CPU)"),
        ({"spec": {"tensor_parallel": 2}}, "other ranks (2 beside 1)"),
        ({"spec": {"batch": 16}}, "other batch (16 beside 1)"),
    ],
)
def test_times_of_other_devices_and_batches_stand_apart_where_scores_do_not(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    both = board(made(tmp_path / "a"), made(tmp_path / "b", **changes))
    assert len(both.sections) == 1 and len(both.times) == 2
    assert any(said in line for line in both.notes())


def test_another_version_of_a_task_is_another_task(tmp_path: Path) -> None:
    both = board(made(tmp_path / "a"), made(tmp_path / "b", source="2"))
    assert sum("has 2 versions (1, 2)" in line for line in both.notes()) == 2
    assert both.sections[0].rows["cell"].nunique() == 4


def test_methods_whose_code_differs_among_runs_are_said(tmp_path: Path) -> None:
    def sources(good: str) -> dict[str, Any]:
        return {"weights_hash": "w", "dtype": "bfloat16", "method_sources": {"full": "f", "good:budget=2": good}}

    runs = [made(tmp_path / name, facts=sources(good)) for name, good in (("a", "1"), ("b", "1"), ("c", "2"))]
    assert not any("code" in note for note in board(*runs[:2]).notes())
    assert "Runs have other code of good (--redo asks again)." in list(board(*runs).notes())


def test_an_answer_that_two_runs_have_counts_once(tmp_path: Path) -> None:
    one, two = board(made(tmp_path / "a")), board(made(tmp_path / "a"), made(tmp_path / "b"))
    counts = [one.sections[0].standings[0].loss.samples, two.sections[0].standings[0].loss.samples]
    assert counts == [40, 40]


def test_a_run_without_full_attention_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tmp_path / "a")
    monkeypatch.delitem(METHODS, "full")
    entries, said = read_entries([whole, made(tmp_path / "b")])
    assert [entry.name for entry in entries] == ["a"] and said == ["b is left out: it has no records of 'full'."]


def test_a_study_s_runs_go_by_names_at_their_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and times meet although the options that met the budget were others."""
    monkeypatch.setitem(METHODS, "good:budget=1", METHODS["good"])
    monkeypatch.delitem(METHODS, "good")
    one = made(tmp_path / "kept=0.25-length=1024-question=prompt", lengths=(1024,))
    monkeypatch.setitem(METHODS, "good:budget=2", METHODS.pop("good:budget=1"))
    other = made(tmp_path / "kept=0.25-length=4096-question=prompt", lengths=(4096,))
    (section,) = board(one, other).sections
    assert section.budget == 0.25 and {one.entrant for one in section.standings} == set(METHODS) - {"full"} - {
        "good:budget=2"
    } | {"good"}


def test_what_keeps_everything_meets_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "good", (1.0, 2.0, 1.0))
    monkeypatch.setitem(METHODS, "quest", (1.0, 2.0, 1.0))  # of which a step reads a share
    both = board(made(tmp_path / "kept=0.25-length=4096-question=prompt"))
    matched, other = both.sections
    assert {one.entrant for one in matched.standings} == {"fast", "random", "quest"} and matched.budget == 0.25
    assert [one.entrant for one in other.standings] == ["good"] and "options as given" in other.title
    assert {(pace.entrant, pace.budget, pace.kept) for pace in both.clocks[0].paces if pace.kept == 1} == {
        ("good", 0.0, 1.0),
        ("quest", 0.25, 1.0),
    }


def test_an_answer_says_what_it_costs_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "good", (1.0, 0.5, 4.0))
    (small,) = (one for one in answers(board(made(tmp_path / "a")), points=10) if one.need.measure == "kv")
    assert small.entrant == "good" and [words for words, _ in small.price] == ["TTFT", "time a token"]
    assert small.price[0][1].value == pytest.approx(0.5, rel=0.01)
    monkeypatch.setitem(METHODS, "fast", (0.9, 1.5, 4.0))
    found = [one for one in answers(board(made(tmp_path / "c")), points=20) if one.need.measure == "kv"]
    assert [one.entrant for one in found] == ["fast", "good"], "as small, and none the slower"
    monkeypatch.setitem(METHODS, "good", (1.0, 0.99, 4.0))  # as fast, or nearly
    assert [one.price for one in answers(board(made(tmp_path / "b")), points=10) if one.entrant == "good"] == [[]]


def test_what_wins_next_to_nothing_serves_no_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, right in (("good", 1.0), ("fast", 0.2), ("random", 0.9)):
        monkeypatch.setitem(METHODS, name, (right, 1.015, 1.0))
    same = board(made(tmp_path / "a"))
    assert answers(same, points=10) == [] and missing(same, NEEDS[0], points=10).startswith(
        "nobody wins; the best has 1.01x"
    )


def test_of_those_that_likely_lose_more_one_is_named_for_winning_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fast", "also"):
        monkeypatch.setitem(METHODS, name, (0.8, 1.5, 8.0))
    found = answers(board(made(tmp_path / "a")), points=10)
    assert [(one.entrant, one.standing) for one in found if one.need.measure == "ttft"] == [("good", "shown")]
    small = [(one.entrant, one.standing) for one in found if one.need.measure == "kv"]
    assert small == [("good", "shown"), ("also", "doubtful")]


def test_a_budget_that_was_scored_and_not_timed_counts_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs besides is what it costs at the nearest budget with times."""
    monkeypatch.setitem(METHODS, "good", (0.2, 0.5, 4.0))
    quarter = made(tmp_path / "kept=0.25-length=4096-question=prompt")
    monkeypatch.setitem(METHODS, "good", (1.0, 9.0, 2.0))
    monkeypatch.setitem(METHODS, "new", (1.0, 9.0, 1.5))
    half = made(tmp_path / "timed")
    lines = [Record.model_validate_json(line) for line in (half / SAMPLES).read_text().splitlines()]
    untimed = [one.model_copy(update={"ttft_s": None, "tpot_s": None, "e2e_s": None}) for one in lines]
    half = save(tmp_path / "kept=0.5-length=4096-question=prompt", load_manifest(half), untimed)
    small = [one for one in answers(board(quarter, half), points=10) if one.need.measure == "kv"]
    found = [(one.entrant, one.budget, one.length, one.standing, one.priced) for one in small]
    assert found == [("good", 0.5, None, "shown", 0.25), ("new", 0.5, None, "shown", None)]
    first = small[0]
    assert first.gain.value == pytest.approx(2, rel=0.01)
    assert [words for words, _ in first.price] == ["TTFT", "time a token"]
    text = to_markdown(needs_table(board(quarter, half), points=10))
    assert "over the scored prompts" in text and "later (read at budget 0.25)" in text and "not timed" in text


def test_a_step_that_reads_everything_is_not_what_long_answers_need(tmp_path: Path) -> None:
    def needs(name: str, read: int) -> set[str]:
        folder, bytes_read = made(tmp_path / name), {"full": 100}
        lines = [Record.model_validate_json(line) for line in (folder / SAMPLES).read_text().splitlines()]
        changed = [one.model_copy(update={"decode_read_bytes": bytes_read.get(one.method, read)}) for one in lines]
        run_again = save(tmp_path / f"{name}-2", load_manifest(folder), changed)
        return {one.need.measure for one in answers(board(run_again), points=10)}

    assert needs("a", 50) == {"ttft", "kv", "tpot"} and needs("b", 100) == {"ttft", "kv"}


def test_losses_stand_beside_what_full_attention_scores(tmp_path: Path) -> None:
    (section,) = board(made(tmp_path / "a")).sections
    assert (
        section.full == 100
        and section.kinds == {"finding": 100}
        and list(section.suites) == ["needle 1,024", "needle 4,096"]
    )
    (fast,) = (one for one in section.standings if one.entrant == "fast")
    assert fast.suites["needle 4,096"].value == pytest.approx(-80)


def rows(diff: np.ndarray[Any, Any], cells: int) -> pd.DataFrame:
    number = len(diff)
    return pd.DataFrame(
        {
            "diff": diff,
            "cell": [f"c{n % cells}" for n in range(number)],
            "unit": [f"u{n // cells}" for n in range(number)],
        }
    )


@pytest.mark.parametrize("cells", [1, 10, 50])
@pytest.mark.slow
def test_intervals_of_losses_hold_the_truth_often_enough(cells: int) -> None:
    generator, held = np.random.default_rng(1), 0
    for _ in range(300):
        diff = generator.choice([-1.0, 0.0, 1.0], size=100, p=[0.1, 0.85, 0.05])
        found = loss(rows(diff, cells))
        held += found.low <= -5 <= found.high
    assert held / 300 >= 0.92


def test_tasks_count_the_same_whatever_their_number_of_samples() -> None:
    frame = rows(np.array([-1.0] * 10 + [0.0] * 90), 1).assign(cell=["a"] * 10 + ["b"] * 90, unit=range(100))
    assert loss(frame.assign(unit=frame["unit"].astype(str))).value == pytest.approx(-50)


def test_few_samples_have_no_interval_and_equal_ones_a_wide_one() -> None:
    assert math.isnan(loss(rows(np.zeros(5), 1)).low)
    same = loss(rows(np.zeros(30), 1))
    assert (same.low, same.high) == pytest.approx((-10, 10))


def test_ranks_have_intervals_that_overlap_where_methods_are_alike() -> None:
    generator = np.random.default_rng(2)
    share = {"best": 0.95, "alike": 0.93, "worst": 0.2}
    frame = pd.DataFrame(
        [
            {
                "entrant": name,
                "cell": f"c{number % 4}",
                "sample": str(number),
                "score": float(generator.random() < right),
            }
            for name, right in share.items()
            for number in range(80)
        ]
    )
    found = ranks(frame)
    assert found["worst"] == (3, 3, 3) and found["best"][2] == 2 and found["alike"][1] == 1
    perfect = frame.assign(score=1.0)
    assert {place[2] for place in ranks(perfect).values()} == {3}, "240 right answers do not show that they are alike"
    assert ranks(frame[(frame["entrant"] != "best") | (frame["sample"] == "nowhere")])["worst"] == (2, 2, 2)


def test_where_a_method_starts_to_win(tmp_path: Path) -> None:
    own = paired(read_entries([made(tmp_path / "a", lengths=(1024, 4096, 8192))])[0])
    own = own[own["entrant"] == "good"]
    assert wins_from(own, "ttft") == (4096, True) and wins_from(own, "kv") == (1024, True)
    assert math.isnan(ratio(own, "kv").low) and ratio(own[own["length"] == 1024], "ttft").value == pytest.approx(
        0.5, rel=0.01
    )


def test_requests_of_a_batch_are_one_pair_of_times_and_many_of_answers_and_bytes(tmp_path: Path) -> None:
    for size, pairs in ((2, 10), (4, 5)):
        own = paired(read_entries([made(tmp_path / f"{size}", lengths=(1024,), batch=size)])[0])
        own = own[own["entrant"] == "good"]
        assert (ratio(own, "ttft").samples, ratio(own, "ttft").sure) == (pairs, pairs >= 6)
        assert ratio(own, "kv").samples == loss(own).samples == 20


def test_kinds_of_tasks() -> None:
    assert kind("ruler/niah_multikey_2:lengths=4096") == kind("needle") == kind("retrieval/multikey") == "finding"
    assert kind("longbench/trec_e") == "few-shot" and kind("speed:lengths=8") == "speed"
    assert suite("ruler/vt:lengths=4096") == "ruler 4,096" and suite("longbench/trec_e") == "longbench"


def test_the_command_writes_pages_whose_links_lead_somewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_pictures: None
) -> None:
    assert run("leaderboard", made(tmp_path / "a"), "--output", tmp_path / "out", "--points", 10) == 0
    said = capsys.readouterr().out
    assert "`A short time to first token` | `good`" in said
    page = (tmp_path / "out/index.html").read_text()
    for address in ("methods/good.html", "runs/a/index.html", "../a/samples.jsonl"):
        assert f'href="{address}"' in page and (tmp_path / "out" / address).is_file()
    method = (tmp_path / "out/methods/fast.html").read_text()
    assert "../runs/a/index.html#samples" in method and "needle:" in method
    assert run("leaderboard", tmp_path / "nothing") == 2
