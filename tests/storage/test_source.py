"""The hash of a method's code follows what the code imports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.registry import _import_file
from harness.runner.catalog import METHODS, TASKS
from harness.storage import source


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's packages that may be edited; classes stay those of the original."""
    for package in source.PACKAGES:
        shutil.copytree(source.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    root, original = source.ROOT, source._source_file
    monkeypatch.setattr(source, "_source_file", lambda kind: tmp_path / original(kind).relative_to(root))
    monkeypatch.setattr(source, "ROOT", tmp_path)
    return tmp_path


def hashes(*names: str) -> list[str]:
    return [source.source_hash(METHODS.get(name)) for name in names]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_a_copy_elsewhere_has_the_same_hash(request: pytest.FixtureRequest) -> None:
    before = hashes(*METHODS.names())
    request.getfixturevalue("copied")
    assert hashes(*METHODS.names()) == before


def test_editing_what_a_method_imports_changes_its_hash_and_no_other(copied: Path) -> None:
    slim, lazyllm, full, quest = hashes("slim", "lazyllm", "full", "quest")
    append(copied / "methods/common/schedule.py", "# edited\n")
    changed = hashes("slim", "lazyllm", "full", "quest")
    assert changed[0] != slim and changed[1] != lazyllm and changed[2:] == [full, quest]


def test_full_attention_s_answers_do_not_depend_on_what_other_methods_decode_with() -> None:
    covered = {*source.source_files(Engine), *source.source_files(METHODS.get("full"))}
    kernels = {name.rpartition(".")[2] for name in covered if ".kernels." in name}
    assert kernels == {"decode_attention", "online_softmax", "gemv", "rowwise", "store_rows", "take_rows"}
    assert not [name for name in covered if name.startswith(("methods.common", "methods.replay"))]
    replays = {name.rpartition(".")[2] for name in covered if ".replay." in name}
    assert replays == {"decode_table", "overlap", "places", "recorded", "recorded_prefill", "replay"}


@pytest.mark.parametrize("file", ["harness/engine/method.py", "harness/engine/cache.py", "harness/engine/attention.py"])
@pytest.mark.slow
def test_editing_what_all_methods_build_on_changes_every_hash(copied: Path, file: str) -> None:
    before = hashes(*METHODS.names())
    append(copied / file, "\n")
    assert not set(before) & set(hashes(*METHODS.names()))


def test_reports_and_storage_are_no_part_of_an_answer(copied: Path) -> None:
    kinds: list[type] = [*map(METHODS.get, METHODS.names()), TASKS.get("needle"), TASKS.get("longbench")]
    before = [source.source_hash(kind) for kind in kinds]
    for file in ("report/render.py", "storage/store.py", "runner/execute.py", "cli.py"):
        append(copied / "harness" / file, "\n")
    assert [source.source_hash(kind) for kind in kinds] == before


def test_line_ends_do_not_count(copied: Path) -> None:
    before = hashes("slim")
    path = copied / "methods/slim.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert hashes("slim") == before


def test_a_base_class_in_another_file_counts(copied: Path) -> None:
    before = hashes("random")
    append(copied / "methods/slim.py", "\n")
    assert hashes("random") != before


PLUGIN = """
def choose():
    from methods.common.capacity import capacity

class Mine:
    def f(self): ...
"""


def plugin(folder: Path, text: str = PLUGIN) -> Any:
    folder.mkdir()
    (folder / "mine.py").write_text(text)
    return _import_file(folder / "mine.py").Mine


def test_a_single_file_plugin_is_followed_and_its_place_does_not_count(tmp_path: Path) -> None:
    here, there = plugin(tmp_path / "here"), plugin(tmp_path / "there")
    assert sorted(source.source_files(here)) == ["methods.common.capacity", "mine"]
    assert source.source_hash(here) == source.source_hash(there)
    assert source.source_hash(here) != source.source_hash(plugin(tmp_path / "edited", PLUGIN + "\n"))


def test_helpers_beside_a_single_file_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the helpers import too, and packages; what is installed is not."""
    monkeypatch.syspath_prepend(tmp_path / "here")
    text = "import beside_a, torch, json\nfrom beside_b.inner import f\nclass Mine:\n    def f(self): ...\n"
    (tmp_path / "here" / "beside_b").mkdir(parents=True)
    for name, code in {"a": "import beside_c", "c": "", "b/__init__": "", "b/inner": "f = 1"}.items():
        (tmp_path / "here" / f"beside_{name}.py").write_text(code + "\n")
    (tmp_path / "here" / "mine.py").write_text(text)
    mine = _import_file(tmp_path / "here" / "mine.py").Mine
    assert sorted(source.source_files(mine)) == ["beside_a", "beside_b.inner", "beside_c", "mine"]
    before = source.source_hash(mine)
    append(tmp_path / "here" / "beside_c.py", "x = 1\n")
    assert source.source_hash(mine) != before


def test_a_base_from_another_plugin_counts(tmp_path: Path) -> None:
    base = plugin(tmp_path / "base")
    own = plugin(tmp_path / "own", "class Mine:\n    def g(self): ...\n")
    assert source.source_hash(type("Both", (own, base), {"__module__": own.__module__, "f": own.g})) != (
        source.source_hash(type("One", (own,), {"__module__": own.__module__, "f": own.g}))
    )


def test_imports_of_other_packages_are_their_versions_matter() -> None:
    class Layer(torch.nn.Module, Method): ...

    found = source.source_files(Layer)
    torch_files = [name for name in found if name.startswith("torch")]
    assert "harness.engine.method" in found and torch_files == ["torch.nn.modules.module"]


PACKAGE = {
    "acme/__init__.py": "",
    "acme/deep/__init__.py": "from ..util import helper\n",
    "acme/deep/slim2.py": "from . import near\nfrom .far import thing\nimport methods.common.capacity\nclass Slim2:...",
    "acme/deep/near.py": "from harness.engine import hardware\n",
    "acme/deep/far.py": "import os, torch\n",
    "acme/util.py": "",
    "acme/unused.py": "",
}


def test_an_installed_package_is_followed_in_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    kind = type("Slim2", (), {"__module__": "acme.deep.slim2"})
    monkeypatch.setattr(source, "_source_file", lambda kind: tmp_path / "acme/deep/slim2.py")
    assert sorted(source.source_files(kind)) == [
        "acme.deep.far",
        "acme.deep.near",
        "acme.deep.slim2",
        "harness.engine.hardware",
        "methods.common.capacity",
    ]
    monkeypatch.setattr(source, "_source_file", lambda kind: tmp_path / "acme/deep/__init__.py")
    package = type("Slim2", (), {"__module__": "acme.deep"})
    assert sorted(source.source_files(package)) == ["acme.deep", "acme.util"]


def test_a_class_without_a_file_has_no_source_hash() -> None:
    with pytest.raises(ValueError, match="comes from no source file"):
        source.source_hash(int)
