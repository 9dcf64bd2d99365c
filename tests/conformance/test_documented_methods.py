"""What the documents tell a third party to write works as it stands there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from harness.conformance.kit import CHECKS, DECODING, Subject, conformance
from harness.conformance.tiny import MODELS
from harness.engine.method import Method
from harness.registry import Registry
from harness.runner.catalog import MethodSpec
from tasks.base import Sample, Task, TaskContext

ROOT = Path(__file__).resolve().parent.parent.parent
GUIDE, CONTRIBUTING = ROOT / "docs" / "add-a-method.md", ROOT / "CONTRIBUTING.md"


def blocks(document: Path, language: str = "python") -> list[str]:
    """The document's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def load(code: str, folder: Path, registry: Registry[Method]) -> type[Method]:
    path = folder / "own.py"
    path.write_text(code)
    (name,) = registry.load_file(path)
    return registry.get(name)


WORKED = {
    "stride": (GUIDE, 0, {}),
    "stride-tokens": (GUIDE, 0, {"keep": "100"}),
    "glance": (GUIDE, 1, {}),
    "near": (GUIDE, 2, {}),
    "near-tokens": (GUIDE, 2, {"reach": "100"}),
    "vnorm": (CONTRIBUTING, 0, {}),
    "vnorm-tokens": (CONTRIBUTING, 0, {"budget": "100", "window": "8"}),
    "ends": (CONTRIBUTING, 1, {}),
    "ends-tokens": (CONTRIBUTING, 1, {"keep": "100"}),
}


@pytest.mark.parametrize(("document", "place", "options"), WORKED.values(), ids=WORKED)
@pytest.mark.slow
def test_a_worked_method_conforms(document: Path, place: int, options: dict[str, str], tmp_path: Path) -> None:
    kind = load(blocks(document)[place], tmp_path, Registry("method", "methods", Method))
    # The project's own methods meet every model; for these every family and every layout of heads will do.
    models = MODELS[:1] if options else DECODING
    report = conformance(MethodSpec("own", kind, kind.Options.read("own", options)), models=models)
    assert report.passed, str(report)


KEPT = {
    "stride": (GUIDE, 0, [167] * 6),
    "glance": (GUIDE, 1, [167] * 6),
    "vnorm": (CONTRIBUTING, 0, [84] * 6),
    "ends": (CONTRIBUTING, 1, [333] * 3 + [167] * 3),
}


@pytest.mark.parametrize(("document", "place", "counts"), KEPT.values(), ids=KEPT)
def test_a_worked_method_really_prunes(document: Path, place: int, counts: list[int], tmp_path: Path) -> None:
    kind = load(blocks(document)[place], tmp_path, Registry("method", "methods", Method))
    assert kept(kind, {}) == counts


def kept(kind: type[Method], options: dict[str, str]) -> list[float]:
    return list(Subject(MethodSpec("own", kind, kind.Options.read("own", options))).trace(333).prefilled.kept)


def test_the_worked_methods_are_short() -> None:
    for code in (*blocks(GUIDE), *blocks(CONTRIBUTING)[:2]):
        assert len(code.splitlines()) <= 45


def test_the_guide_lists_the_checks_in_their_order() -> None:
    assert re.findall(r"^\| `(.*?)` \|", GUIDE.read_text(), flags=re.MULTILINE) == list(CHECKS)


def test_the_entry_point_in_the_guide_is_the_one_that_is_searched() -> None:
    (project,) = blocks(GUIDE, "toml")
    assert tomllib.loads(project)["project"]["entry-points"] == {
        "harness.methods": {"stride": "your_package.stride:Stride"}
    }


class Bytes:
    """A tokenizer of bytes."""

    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode()


def test_the_worked_task_asks_and_scores(tmp_path: Path) -> None:
    registry: Registry[Task] = Registry("task", "tasks", Task)
    path = tmp_path / "own.py"
    path.write_text(blocks(CONTRIBUTING)[2])
    (name,) = registry.load_file(path)
    kind = registry.get(name)
    task = kind("sums:lines=5", kind.Options.read("sums", {"lines": "5"}), TaskContext(limit=3))
    samples: list[Sample] = list(task.samples(Bytes()))
    assert [sample.answers for sample in samples] == [("3",), ("5",), ("7",)]
    assert samples[0].prompt.count("\n") == 5 and len({sample.id for sample in samples}) == 3
    assert task.score(samples[0], " 3\n") == 1 and task.score(samples[0], "4") == 0
