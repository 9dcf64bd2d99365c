from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.advice import advice, warnings
from harness.report.build import report
from harness.report.recorded import read
from harness.report.samples import outcome, reason, samples, script_json
from tests.report.browser import Browser
from tests.report.test_report import long_records, record, write
from tests.report.test_tables import needle_records, written

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--<script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every answer, accepted answer, sample id, method and task tries to be markup; nothing is drawn."""
    changes: dict[str, Any] = {"prediction": ATTACK, "answers": [ATTACK]}
    records = [one.model_copy(update=changes) for one in needle_records(3)]
    changes |= {"tokens_kept": [100] * 4, "tokens_requested": [100] * 4}
    records += [record("full", f"mine/{ATTACK}", 0, **changes), record(f"m:{ATTACK}", f"mine/{ATTACK}", 0, **changes)]
    folder = written(tmp_path_factory.mktemp("runs") / "main", records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.figures", lambda *_: [])
        report([folder])
    return folder


def page_of(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def dom(tab: Browser, run: Path, fragment: str = "") -> str:
    """The page after its scripts ran, as a browser has it."""
    tab.open(run / "report" / "index.html", fragment)
    return str(tab.js("document.documentElement.outerHTML"))


def test_nothing_that_a_model_wrote_is_markup(run: Path) -> None:
    page = page_of(run)
    assert ATTACK not in page and page.count("<script") == 2 and 'onerror="' not in page
    assert data_of(page)["samples"][0]["r"][0]["y"] == ATTACK


@pytest.mark.slow
def test_in_a_browser_a_script_in_an_answer_stays_text(run: Path, tab: Browser) -> None:
    page = dom(tab, run, "#sample=needle%2F2048-0.5-1")
    assert "<title>main</title>" in page
    detail = page.partition('<article id="detail"')[2].partition("</article>")[0]
    assert html.escape(ATTACK, quote=False) in detail and "<img" not in detail
    assert "needle/2048-0.5-1" in detail and "needle dropped at layer 2 (5 of its 10 tokens were kept)" in detail


def test_in_a_browser_flips_come_first_and_a_wrong_link_says_so(run: Path, tab: Browser) -> None:
    page = dom(tab, run, "#sample=nothing")
    first = page.partition('<ol id="list"')[2].partition("</li>")[0]
    assert "1 lost" in first and 'aria-current="true"' in first
    assert "No such sample in this page: nothing" in page and "19 of 19 samples" in page


def test_the_page_asks_the_network_for_nothing(run: Path) -> None:
    page = page_of(run).partition('id="data"')[0]
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page


@pytest.mark.slow
def test_a_thousand_long_samples_stay_below_five_megabytes_and_ten_seconds(tmp_path: Path) -> None:
    methods = ["full", *(f"slim:budgets=0.{number}" for number in range(1, 5))]
    records = [
        record(
            method,
            "qmsum",
            number,
            prediction=("\u4e2d" * 20 + "<") * 100,
            score=number % 7 / 7,
            ttft_s=1.0 + number % 3,
        )
        for number in range(1000)
        for method in methods
    ]
    folder = written(tmp_path / "run", records)
    start = time.process_time()
    report([folder])
    assert time.process_time() - start < 10
    assert (folder / "report" / "index.html").stat().st_size < 5e6
    assert len(data_of(page_of(folder))["samples"]) == 1000


def test_samples_beyond_the_limit_are_left_out_and_counted(run: Path) -> None:
    data = samples(read(run), limit=3000)
    assert len(script_json(data["samples"])) < 3200 and data["total"] == 19 > len(data["samples"]) > 0
    assert data["samples"][0]["r"][1]["o"] == "lost"


@given(
    st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
)
def test_json_cannot_end_its_script(value: Any) -> None:
    text = script_json(value)
    assert "<" not in text and ">" not in text and json.loads(text) == value


def test_lone_surrogates_do_not_break_the_page() -> None:
    assert script_json("a\ud800b") == '"a\ufffdb"'


@pytest.mark.parametrize(
    ("score", "base", "word"),
    [(0.0, 1.0, "lost"), (1.0, 0.0, "gained"), (0.0, 0.0, "wrong"), (1.0, None, "right"), (None, 1.0, "unscored")],
)
def test_outcome(score: float | None, base: float | None, word: str) -> None:
    assert outcome(score, base) == word


def test_reasons_are_given_only_where_they_are_known() -> None:
    extra = {"needles": [[5, 8]], "kept_spans": [[[0, 10]], [[0, 5]]]}
    assert reason(0.0, extra, 10) == "needle dropped at layer 1"
    assert reason(0.0, extra | {"kept_spans": [[[0, 10]]]}, 10) == "needle kept in all 1 layers, and still wrong"
    assert reason(1.0, extra, 10) == reason(0.0, {"needles": [[5, 8]]}, 10) == reason(None, extra, 10) == ""
    shares = {"needles": [[5, 8]], "kept_spans": None, "kept_shares": [[1.0, 0.5], None, [1.0, 0.25]]}
    assert reason(0.0, shares, 10) == "of the needle's surroundings layer 2 kept least: 25%"


def test_advice_is_what_the_paired_tests_say(run: Path, tmp_path: Path) -> None:
    assert "No method is shown" in advice(read(write(tmp_path / "lossy", long_records())))
    fast = [one for one in needle_records(30) if one.extra["depth"] != 0.5]
    text = advice(read(written(tmp_path / "fast", fast)))
    assert text.startswith("slim:budgets=0.5 is the fastest of the methods shown") and "first token 1.67x" in text
    few = [one for one in fast if one.sample.endswith(("-0", "-1"))]
    assert advice(read(written(tmp_path / "few", few))).startswith("Undecided: no method is shown to be both sooner")
    alone = read(write(tmp_path / "alone", [record("lazyllm", "needle", 0)]))
    assert "no full" in advice(alone) and any("samples" in text for text in warnings(alone))
