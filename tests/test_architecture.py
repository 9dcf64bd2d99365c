"""The floors of the house: who may import whom.

All imports count, those inside functions and for type checkers too: a module that has to know another one is above it.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "methods", "tasks")
FLOORS = (
    {"harness.errors", "harness.flags"},
    {"harness.options", "harness.grammar", "harness.registry", "harness.yaml_file"},
    {"harness.option_help"},
    {"harness.statistics", "harness.storage", "harness.engine", "tasks"},
    {"harness.models", "methods", "harness.rows", "harness.shape"},
    {"harness.measuring"},
    {"harness.report", "harness.gates", "harness.executors"},
    {"harness.runner", "harness.predict"},
    {"harness.conformance", "harness.sweep", "harness.reproduce", "harness.calibrate", "harness.capacity"},
    {"harness.leaderboard"},
    {"harness.study"},
    {"harness.api"},
    {"harness.cli", "harness"},
    {"harness.__main__"},
)
"""Rooms from the ground up; a room imports from itself and from the floors below."""
KERNELS = "harness.engine.kernels"

Imports = dict[str, set[str]]


@cache
def trees() -> dict[str, ast.Module]:
    """Module -> its syntax."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {module(path): ast.parse(path.read_text()) for path in paths}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports() -> Imports:
    """Module -> modules of the project that it imports anywhere."""
    return {name: imported(tree) - {name} for name, tree in trees().items()}


def imported(tree: ast.Module) -> set[str]:
    """A name imported from a package is that name's module, where there is one."""
    names: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(f"{node.module}.{alias.name}", node.module or "") for alias in node.names]
    return {full if full in trees() else parent for full, parent in names} & trees().keys()


def room(name: str) -> str:
    """`harness.runner` of `harness.runner.order`; `methods` of all methods."""
    return ".".join(name.split(".")[:2]) if name.startswith("harness.") else name.split(".")[0]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


def climbs(importer: str, other: str) -> bool:
    return room(importer) != room(other) and floor(other) >= floor(importer)


def cycle(graph: Imports) -> list[str]:
    """One circle of modules; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_is_on_one_floor() -> None:
    placed = [name for rooms in FLOORS for name in rooms]
    assert len(placed) == len(set(placed))
    assert set(placed) == {room(name) for name in trees()}


def test_rooms_import_from_the_floors_below() -> None:
    pairs = {(importer, other) for importer, others in imports().items() for other in others}
    assert not {pair for pair in pairs if climbs(*pair)}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not cycle(imports())


def test_kernels_import_kernels_alone() -> None:
    of_kernels = {name: others for name, others in imports().items() if name.startswith(KERNELS)}
    assert len(of_kernels) > 2
    assert not {other for others in of_kernels.values() for other in others if not other.startswith(KERNELS)}


def test_the_finders_find() -> None:
    tree = ast.parse(
        "def f():\n    from harness.runner import order\n    import tasks.base\n    from harness.errors import x"
    )
    assert imported(tree) == {"harness.runner.order", "tasks.base", "harness.errors"}
    assert climbs("harness.engine.step", "methods.full") and climbs("tasks.base", "harness.engine.step")
    assert not climbs("harness.cli", "tasks.base") and not climbs("methods.slim", "methods.common.scores")
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not cycle({"a": {"b", "c"}, "b": {"c"}})


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in trees().items() if not ast.get_docstring(tree)] == []


def test_importing_a_package_runs_nothing() -> None:
    """Its file is a docstring; `harness` alone has a function that loads when it is asked."""
    packages = {module(path) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
    busy = {name for name in packages if not all(map(idle, trees()[name].body))}
    assert not busy and {name for name in packages if len(trees()[name].body) > 1} == {"harness"}


def idle(statement: ast.stmt) -> bool:
    """A docstring, a definition, or an import of nothing of the project."""
    if isinstance(statement, ast.If):
        return ast.unparse(statement.test) == "TYPE_CHECKING"
    if isinstance(statement, ast.ImportFrom):
        return statement.module in ("__future__", "typing")
    return isinstance(statement, ast.FunctionDef) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
