"""What git tracks: every link between documents leads to it, and recorded runs stay light."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES, MOST_BYTES = 200, 12_000_000

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")


def git_files(*options: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


@cache
def tracked() -> frozenset[Path]:
    """Every tracked file, and every folder that holds one."""
    files = [ROOT / name for name in git_files()]
    return frozenset(path for file in files for path in (file, *file.parents))


def prose(page: Path) -> str:
    """A page without its code, where brackets are no links."""
    return re.sub(
        r"^```.*?^```|^    .*?$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(page: Path) -> set[str]:
    """What a fragment may name: the headings, as hosts of Markdown spell them."""
    titles = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = re.match(r"[a-z]+:", link) or (target in tracked() and (not fragment or fragment in anchors(target)))
        found += [] if known else [link]
    return found


def test_every_link_of_a_page_leads_to_something_tracked() -> None:
    pages = [ROOT / name for name in git_files("*.md")]
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md"} < set(pages)
    assert not {page.name: links for page in pages if (links := broken(page))}


def test_links_to_nothing_and_to_what_is_only_drawn_are_broken(tmp_path: Path) -> None:
    good = ["README.md", "docs", "docs/reports.md#what-is-tracked"]
    bad = ["docs/none.md", "reports/reference/index.html", "docs/reports.md#nowhere"]
    page = tmp_path / "page.md"
    page.write_text(" ".join(f"[text]({ROOT / link})" for link in (*good, *bad)) + " [text](https://example.org)")
    assert broken(page) == [str(ROOT / link) for link in bad]


@pytest.mark.slow
def test_recorded_runs_stay_light_and_what_can_be_drawn_is_not_tracked() -> None:
    files = git_files("results", "reports")
    assert len(files) < MOST_FILES and sum((ROOT / name).stat().st_size for name in files) < MOST_BYTES
    assert not git_files("--cached", "--ignored", "--exclude-standard"), ".gitignore says what is tracked"
