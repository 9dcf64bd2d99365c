"""The page in a headless Chromium: what a reader does with a keyboard, a mouse and a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.report.build import report
from tests.report.browser import Browser
from tests.report.test_report import record
from tests.report.test_tables import needle_records, written

pytestmark = pytest.mark.slow

METHODS = ("full", "slim:budgets=0.5", "lazyllm")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Needles of two lengths, slim losing those in the middle, and a task of other methods' answers."""
    layers = {"tokens_kept": [100] * 4, "tokens_requested": [100] * 4}
    mine = [record(method, "mine/one", n, prediction=f"answer {n}", **layers) for n in range(3) for method in METHODS]
    folder = written(tmp_path_factory.mktemp("runs") / "main", [*needle_records(3), *mine])
    report([folder])
    return folder / "report" / "index.html"


def shown(tab: Browser) -> str:
    """The sample in the detail pane."""
    return str(tab.js("document.querySelector('#detail h3')?.textContent"))


def current(tab: Browser) -> str:
    return str(tab.js("document.querySelector('#list [aria-current=true]')?.firstChild.textContent"))


def set_field(tab: Browser, name: str, value: str) -> None:
    tab.js(f"(() => {{ const field = document.getElementById('{name}'); field.value = '{value}'; "
           "field.dispatchEvent(new Event('input')); })()")  # fmt: skip


def column(tab: Browser, table: str, index: int) -> list[Any]:
    cells = f"[...document.querySelectorAll('#table-{table} tbody tr')].map(row => row.children[{index}].dataset.v)"
    return list(tab.js(f"{cells}.map(text => text === undefined ? null : isNaN(text) ? text : Number(text))"))


def test_j_and_k_go_through_the_samples_and_the_link_follows(page: Path, tab: Browser) -> None:
    tab.open(page)
    first = shown(tab)
    assert first == current(tab) == "needle/1024-0.5-0"
    tab.press("j", "j")
    assert shown(tab) == current(tab) != first
    assert tab.js("decodeURIComponent(location.hash)") == f"#sample={shown(tab)}"
    tab.press("k", "k", "k")
    assert shown(tab) == first, "k stops at the first"


def test_arrows_scroll_the_page_until_the_reader_is_among_the_samples(page: Path, tab: Browser) -> None:
    tab.open(page)
    first = shown(tab)
    tab.press("ArrowDown")
    assert shown(tab) == first
    tab.js("document.getElementById('list').focus()")
    tab.press("ArrowDown")
    assert shown(tab) != first
    tab.press("ArrowUp")
    assert shown(tab) == first


def test_slash_searches_and_escape_leaves(page: Path, tab: Browser) -> None:
    tab.open(page)
    tab.press("/", *"answer 2")
    assert tab.js("document.activeElement.id") == "search"
    assert tab.js("document.getElementById('count').textContent") == "1 of 21 samples" and shown(tab) == "mine/one/2"
    tab.press("j")
    assert tab.js("document.getElementById('search').value") == "answer 2j", "keys are text inside a field"
    tab.press("Escape")
    assert tab.js("document.activeElement.tagName") == "BODY"


def test_tables_sort_by_keyboard_both_ways(page: Path, tab: Browser) -> None:
    tab.open(page)
    before = column(tab, "decision", 0)
    tab.js("document.querySelector('#table-decision th:nth-child(2) button').focus()")
    tab.press("Enter")
    falling = column(tab, "decision", 1)
    assert falling == sorted(falling, reverse=True) and column(tab, "decision", 0) != before
    assert tab.js("document.querySelector('#table-decision th:nth-child(2)').getAttribute('aria-sort')") == "descending"
    tab.press("Enter")
    assert column(tab, "decision", 1) == sorted(falling)
    assert tab.js("document.querySelectorAll('#table-decision th[aria-sort]').length") == 1


def test_what_was_not_measured_sorts_last_both_ways(page: Path, tab: Browser) -> None:
    """Full attention has no speed-up over itself."""
    tab.open(page)
    for _ in range(2):
        tab.js("document.querySelector('#table-decision th:nth-child(6) button').click()")
        assert column(tab, "decision", 5)[-1] is None and None not in column(tab, "decision", 5)[:-1]


def test_filters_by_task_method_and_outcome(page: Path, tab: Browser) -> None:
    tab.open(page)
    tasks = "[...new Set([...document.querySelectorAll('#list li')].map(one => one.textContent.split('/')[0]))]"
    set_field(tab, "task", "mine/one")
    assert tab.js(tasks) == ["mine"] and tab.js("document.querySelectorAll('#list li').length") == 3
    set_field(tab, "outcome", "lost")
    assert tab.js("document.getElementById('count').textContent") == "0 of 21 samples" and shown(tab) == "None"
    set_field(tab, "task", "")
    assert tab.js("document.getElementById('count').textContent") == "6 of 21 samples"
    set_field(tab, "method", "lazyllm")
    assert tab.js("document.getElementById('count').textContent") == "0 of 21 samples", "lazyllm lost none"
    set_field(tab, "method", METHODS[1])
    assert tab.js("document.getElementById('count').textContent") == "6 of 21 samples"


def test_a_deep_link_opens_its_sample_and_another_one_follows(page: Path, tab: Browser) -> None:
    tab.open(page, "#sample=mine%2Fone%2F1")
    assert shown(tab) == current(tab) == "mine/one/1"
    tab.wait("document.getElementById('samples').getBoundingClientRect().top < innerHeight / 2")
    set_field(tab, "task", "needle")
    tab.js("location.hash = '#sample=mine%2Fone%2F2'")
    tab.wait("document.querySelector('#detail h3')?.textContent === 'mine/one/2'")
    assert tab.js("document.getElementById('task').value") == "", "a link that the filters hide clears them"


def test_a_click_on_a_sample_shows_it(page: Path, tab: Browser) -> None:
    tab.open(page)
    tab.js("document.querySelectorAll('#list li')[4].click()")
    assert shown(tab) == current(tab) == tab.js("document.querySelectorAll('#list li')[4].firstChild.textContent")


@pytest.mark.parametrize(("width", "height"), [(1300, 850), (1600, 900)])
def test_the_first_screen_of_a_desk_shows_advice_and_the_whole_table(
    page: Path, tab: Browser, width: int, height: int
) -> None:
    tab.open(page, width=width, height=height)
    region = "document.querySelector('.first .scroll')"
    assert tab.js(f"{region}.scrollWidth <= {region}.clientWidth"), "no sideways scrolling"
    assert tab.js(f"{region}.getBoundingClientRect().bottom < innerHeight")
    assert tab.js("document.querySelector('.advice').getBoundingClientRect().bottom < innerHeight / 2")
    assert tab.js("document.querySelector('figure').getBoundingClientRect().top < innerHeight * 0.7")


@pytest.mark.parametrize("width", [360, 390, 768])
def test_on_a_phone_only_tables_scroll_sideways(page: Path, tab: Browser, width: int) -> None:
    tab.open(page, width=width, height=800)
    assert tab.js("document.documentElement.scrollWidth") == width
    region = "document.querySelector('.first .scroll')"
    tab.js(f"{region}.scrollLeft = 200")
    assert tab.js(f"{region}.scrollLeft") > 0 or width > 700
    head = "document.querySelector('#table-decision tbody td').getBoundingClientRect().left"
    assert tab.js(head) >= 0, "the method stays in sight"
    wide = (
        "[...document.querySelectorAll('#samples *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1)"
    )
    assert tab.js(f"{wide}.length") == 0


def test_on_a_phone_no_heading_breaks_inside_a_word_and_wide_tables_say_that_they_scroll(
    page: Path, tab: Browser
) -> None:
    tab.open(page, width=390, height=800)
    broken = """[...document.querySelectorAll('th button, h1, h2')]
        .flatMap((head) => [...head.childNodes]).flatMap((node) =>
        [...node.textContent.matchAll(/[^\\s:\\/]+/g)].filter((word) => {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1;
        }).map((word) => word[0]))"""
    assert tab.js(broken) == []
    hint = "getComputedStyle(document.querySelector('.first .scroll'), '::before').content"
    assert "scrolls sideways" in tab.js(hint)
    tab.open(page, width=1600)
    assert tab.js(hint) == "none"


def test_a_sample_shows_its_question_and_its_prompt_folded(tmp_path: Path, tab: Browser) -> None:
    asked: dict[str, Any] = {"prompt_text": "Read <b>this</b>. What is it?", "question_text": "What is <i>it</i>?"}
    folder = written(tmp_path / "run", [record("full", "t", 0, **asked), record("full", "t", 1)])
    report([folder])
    tab.open(folder / "report" / "index.html", "#sample=t%2F0")
    assert tab.js("document.querySelector('#detail .question').textContent") == "question: What is <i>it</i>?"
    fold = "document.querySelector('#detail details')"
    assert (
        tab.js(f"{fold}.open") is False and tab.js(f"{fold}.querySelector('pre').textContent") == asked["prompt_text"]
    )
    tab.open(folder / "report" / "index.html", "#sample=t%2F1")
    assert tab.js(fold) is None and tab.js("document.querySelector('#detail .question')") is None


def test_it_reads_on_a_dark_desk(page: Path, tab: Browser) -> None:
    tab.open(page, dark=True)
    assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert tab.js("getComputedStyle(document.querySelector('img')).backgroundColor") == "rgb(255, 255, 255)"


@pytest.fixture(scope="module")
def overview(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    runs = [written(folder / name, needle_records(count)) for name, count in (("one", 3), ("two", 4))]
    report(runs, folder / "out")
    return folder / "out" / "index.html"


def test_a_page_over_runs_sorts_each_table_and_leads_to_the_pages(overview: Path, tab: Browser) -> None:
    tab.open(overview)
    assert tab.js("document.querySelectorAll('table').length") == 2
    before = column(tab, "1", 0)
    tab.js("document.querySelectorAll('#table-2 th button')[1].click()")
    assert column(tab, "2", 1) == sorted(column(tab, "2", 1), reverse=True) and column(tab, "1", 0) == before
    tab.js("document.querySelector('h2 a').click()")
    tab.wait("document.title === 'one' && document.readyState === 'complete'")
    assert shown(tab) == "needle/1024-0.5-0"


def test_a_page_over_runs_fits_a_phone(overview: Path, tab: Browser) -> None:
    tab.open(overview, width=390, height=800)
    assert tab.js("document.documentElement.scrollWidth") == 390
