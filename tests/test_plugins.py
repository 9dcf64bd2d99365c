"""Methods from elsewhere: an installed package's entry point, a single file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import harness
from harness.engine.method import Method
from harness.errors import InputError
from harness.registry import Registry
from harness.runner.catalog import METHODS
from tests.command import run
from tests.test_cli import tiny

CODE = """
from harness.engine.method import Method

class {kind}(Method):
    name = "{name}"
    summary = "from elsewhere"
    simulated = {simulated}
"""


def method_file(path: Path, name: str, *, simulated: bool = False) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(CODE.format(kind=name.title(), name=name, simulated=simulated))
    return path


def distribution(folder: Path, target: str, name: str = "elsewhere") -> None:
    """What an installer leaves of a package with one entry point."""
    info = folder / "harness_elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: harness-elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[harness.methods]\n{name} = {target}\n")


def registry() -> Registry[Method]:
    return Registry("method", "methods", Method)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what was imported from it is forgotten."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and tmp_path in Path(str(sys.modules[name].__file__)).parents:
            del sys.modules[name]


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods loaded by the command line are forgotten after the test."""
    METHODS.names()
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))


def test_an_entry_point_registers_a_method(site: Path) -> None:
    method_file(site / "elsewhere_plugin.py", "elsewhere")
    distribution(site, "elsewhere_plugin:Elsewhere")
    found = registry()
    assert {"elsewhere", "full", "slim"} <= set(found.names())
    assert found.get("elsewhere").__module__ == "elsewhere_plugin"


@pytest.mark.usefixtures("own_registry")
def test_the_command_sees_it(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    method_file(site / "elsewhere_plugin.py", "elsewhere")
    distribution(site, "elsewhere_plugin:Elsewhere")
    monkeypatch.setattr(METHODS, "_searched", False)  # as in a process that begins
    assert run("methods") == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.split(maxsplit=1) == ["elsewhere", "from elsewhere"] for line in listed)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("elsewhere_missing:Elsewhere", "harness-elsewhere failed to import: No module named"),
        ("elsewhere_plugin:Nobody", "harness-elsewhere failed to import"),
        ("elsewhere_plugin:CODE", "harness-elsewhere is no named subclass of Method"),
        ("harness.engine.method:Method", "harness-elsewhere is no named subclass of Method"),
    ],
)
def test_a_broken_entry_point_is_named_in_one_line(site: Path, target: str, words: str) -> None:
    (site / "elsewhere_plugin.py").write_text("CODE = 1\n")
    distribution(site, target)
    with pytest.raises(InputError, match=words) as error:
        registry().names()
    assert "\n" not in str(error.value)


def test_an_entry_point_cannot_take_a_known_name(site: Path) -> None:
    method_file(site / "elsewhere_plugin.py", "slim")
    distribution(site, "elsewhere_plugin:Slim")
    with pytest.raises(InputError, match="two methods are named 'slim'"):
        registry().names()


def test_a_file_may_be_loaded_again_after_an_edit(tmp_path: Path) -> None:
    found = registry()
    path = method_file(tmp_path / "own.py", "own")
    assert found.load_file(path) == ["own"] and not found.get("own").simulated
    method_file(path, "own", simulated=True)
    assert found.load_file(path) == ["own"] and found.get("own").simulated


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    found = registry()
    found.load_file(method_file(tmp_path / "a" / "own.py", "first"))
    found.load_file(method_file(tmp_path / "b" / "own.py", "second"))
    assert found.get("first").__module__ != found.get("second").__module__
    with pytest.raises(InputError, match="two methods are named 'first'"):
        found.load_file(method_file(tmp_path / "c" / "own.py", "first"))


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("atend", "attend"),
        ("after_layers", "after_layer"),
        ("beginn", "begin"),
        ("token_requested", "tokens_requested"),
    ],
)
def test_a_misspelt_hook_is_refused_with_the_right_name(name: str, hook: str, tmp_path: Path) -> None:
    path = method_file(tmp_path / "own.py", "own")
    path.write_text(path.read_text() + f"    def {name}(self):\n        pass\n")
    with pytest.raises(InputError, match=rf"Own\.{name} overrides nothing of Method; did you mean '{hook}'\?") as error:
        registry().load_file(path)
    assert "\n" not in str(error.value)


def test_helpers_of_other_names_and_private_ones_are_the_methods_own_affair(tmp_path: Path) -> None:
    path = method_file(tmp_path / "own.py", "own")
    helpers = ("choose", "block_scores", "rotate", "_atend", "append")
    path.write_text(path.read_text() + "".join(f"    def {name}(self):\n        pass\n" for name in helpers))
    assert registry().load_file(path) == ["own"]


def test_a_misspelt_hook_of_a_class_in_between_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "from methods.slim import Slim\nclass Between(Slim):\n    def after_atention(self):\n        pass\n"
        "class Own(Between):\n    name = 'own'\n"
    )
    with pytest.raises(InputError, match="did you mean 'after_attention'"):
        registry().load_file(path)


def test_one_file_cannot_name_two_methods_alike(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("".join(CODE.format(kind=kind, name="own", simulated=False) for kind in ("One", "Two")))
    with pytest.raises(InputError, match="two methods are named 'own'"):
        registry().load_file(path)


@pytest.mark.usefixtures("own_registry")
def test_methods_of_several_files_are_run_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [method_file(tmp_path / "honest.py", "honest"), method_file(tmp_path / "masks.py", "masks", simulated=True)]
    options = [word for file in files for word in ("--method-file", str(file))]
    assert run("methods", *options) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"honest", "masks", "full"} <= listed
    folder = tmp_path / "run"
    asked = ["--methods", "honest,masks", "--tasks", "needle:lengths=192:depths=0.5:repeats=1"]
    assert run("run", *options, *asked, "--model", tiny(tmp_path), "--output", str(folder)) == 0
    records = harness.load(folder).set_index("method")
    assert records.ttft_s["honest"] > 0 and records.kv_bytes["honest"] > 0
    unmeasured = ["ttft_s", "tpot_s", "e2e_s", "peak_memory_bytes", "kv_bytes", "kv_bytes_host", "extra_bytes"]
    assert records.loc["masks", unmeasured].isna().all()


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "does not exist"),
        ("x = 1\n", "defines no method"),
        ("def broken(:\n", "failed to import: SyntaxError"),
        ("import nothing_of_that_name\n", "failed to import: ModuleNotFoundError"),
        (CODE.format(kind="Slim", name="slim", simulated=False), "two methods are named 'slim'"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["methods"], ["conformance", "full"]], ids=lambda words: words[0])
def test_a_bad_file_is_one_line_and_exit_code_2(
    command: list[str], code: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.py"
    if code is not None:
        path.write_text(code)
    assert run(*command, "--method-file", str(path)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.usefixtures("own_registry")
@pytest.mark.slow
def test_conformance_prints_a_line_a_check_and_exits_0_or_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = method_file(tmp_path / "own.py", "own", simulated=True)
    assert run("conformance", "own", "--method-file", str(path), "--layers", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["pass"] * 11 + ["skip"] + ["pass"] * 4
    assert lines[-1].startswith("own: conforms; simulated")
    path.write_text(path.read_text() + "    def tokens_kept(self):\n        return [0]\n")
    assert run("conformance", "own", "--method-file", str(path)) == 1
    out = capsys.readouterr().out
    assert "\nfail  kept-counts" in out and "checks failed" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["slmi"], "did you mean 'slim'"),
        (["slim:layers=10/20/30"], "must lie in 1..5"),
        (["full,slim"], "one method at a time"),
    ],
)
def test_conformance_of_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("conformance", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
