"""What the documents tell a third party to write works as it stands there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from harness.conformance.kit import CHECKS, Subject, conformance
from harness.conformance.tiny import MODELS
from harness.engine.method import Method
from harness.registry import Registry
from harness.run.catalog import MethodSpec
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


@pytest.mark.parametrize(
    ("document", "options"),
    [
        (GUIDE, {}),
        (GUIDE, {"keep": "100"}),
        (CONTRIBUTING, {}),
        (CONTRIBUTING, {"keep": "0.25", "layer": "2"}),
    ],
    ids=["guide", "guide-tokens", "contributing", "contributing-earlier"],
)
def test_the_worked_method_conforms(document: Path, options: dict[str, str], tmp_path: Path) -> None:
    kind = load(blocks(document)[0], tmp_path, Registry("method", "methods", Method))
    # By default it meets every model, as the project's own methods do.
    models = MODELS[:1] if options else MODELS
    report = conformance(MethodSpec("own", kind, kind.Options.read("own", options)), models=models)
    assert report.passed, str(report)


def test_the_worked_method_really_prunes(tmp_path: Path) -> None:
    kind = load(blocks(GUIDE)[0], tmp_path, Registry("method", "methods", Method))
    assert kept(kind, {}) == [167] * 6 and kept(kind, {"keep": "100"}) == [100] * 6


def kept(kind: type[Method], options: dict[str, str]) -> list[float]:
    return list(Subject(MethodSpec("own", kind, kind.Options.read("own", options))).trace(333).prefilled.kept)


def test_the_worked_method_is_short() -> None:
    (code,) = blocks(GUIDE)
    assert len(code.splitlines()) <= 40


def test_the_guide_lists_the_checks_in_their_order() -> None:
    assert re.findall(r"^\| `(.*?)` \|", GUIDE.read_text(), flags=re.MULTILINE) == list(CHECKS)


def test_the_entry_point_in_the_guide_is_the_one_that_is_searched() -> None:
    (project,) = blocks(GUIDE, "toml")
    assert tomllib.loads(project)["project"]["entry-points"] == {
        "harness.methods": {"keynorm": "your_package.keynorm:KeyNorm"}
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
    path.write_text(blocks(CONTRIBUTING)[1])
    (name,) = registry.load_file(path)
    kind = registry.get(name)
    task = kind("sums:lines=5", kind.Options.read("sums", {"lines": "5"}), TaskContext(limit=3))
    samples: list[Sample] = list(task.samples(Bytes()))
    assert [sample.answers for sample in samples] == [("3",), ("5",), ("7",)]
    assert samples[0].prompt.count("\n") == 5 and len({sample.id for sample in samples}) == 3
    assert task.score(samples[0], " 3\n") == 1 and task.score(samples[0], "4") == 0
