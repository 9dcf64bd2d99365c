"""Which source code an answer depends on, found by reading it, never by running it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("harness", "methods", "tasks")
_INSTALLED = {"site-packages", "dist-packages"}


def source_hash(kind: type) -> str:
    """Sha256 (hex) over the code that a class depends on; the same on every machine.

    That is the file that defines it, the files of its bases, and every module that one of those imports, directly or
    through others, at the top or inside a function, and that is of the project, of the package the class comes from, or
    not installed at all: a helper beside a single file. Importing a name from a package counts the module of that name,
    and the package's own file only where there is none. Of installed packages the version counts, not the source.

    Raises:
        ValueError: the class comes from no file.
    """
    digest = hashlib.sha256()
    for name, path in sorted(source_files(kind).items()):
        digest.update(f"{name} {_file_hash(path)}\n".encode())
    return digest.hexdigest()


def source_files(kind: type) -> dict[str, Path]:
    """Module name -> file, of what `source_hash` covers.

    Raises:
        ValueError: the class comes from no file.
    """
    todo = [(_module(base), _source_file(base)) for base in _bases(kind)]
    find = cache(partial(_find, tops=_tops(*todo[0])))
    found: dict[str, Path] = {}
    while todo:
        name, path = todo.pop()
        if name not in found:
            found[name] = path
            todo += _imports(name, path, find)
    return found


def _bases(kind: type) -> list[type]:
    """The class and its bases, those of Python itself left out."""
    others = [base for base in kind.__mro__[1:] if _top(base.__module__) not in sys.stdlib_module_names]
    return [kind, *others]


def _module(kind: type) -> str:
    # The name of a single file that was loaded as a plugin depends on where it lies; the file's own name does not.
    return kind.__module__ if "." in kind.__module__ else _source_file(kind).stem


def _source_file(kind: type) -> Path:
    try:
        return Path(inspect.getfile(kind))
    except (TypeError, OSError):
        # The import system does not know a single file that was loaded as a plugin; the class's functions do.
        for value in vars(kind).values():
            if isinstance(value, FunctionType):
                return Path(value.__code__.co_filename)
    raise ValueError(f"{kind.__qualname__} comes from no source file")


def _top(module: str) -> str:
    return module.partition(".")[0]


def _tops(module: str, path: Path) -> dict[str, Path]:
    """Top-level package -> the folder it lies in, for the packages that are followed: the project's and the module's.

    A base class may come from anywhere (PyTorch, say), so what it imports from its own package is its version's matter.
    """
    own = path.resolve().parents[module.count(".") + _is_package(path)]
    return {_top(module): own} | dict.fromkeys(PACKAGES, ROOT)


def _is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def _imports(name: str, path: Path, find: Callable[[str], Path | None]) -> Iterator[tuple[str, Path]]:
    package = name if _is_package(path) else name.rpartition(".")[0]
    for wanted in _imported_names(path):
        absolute = _absolute(wanted, package)
        for module in (absolute, absolute.rpartition(".")[0]):
            file = find(module)
            if file is not None:
                yield module, file
                break


@cache
def _tree_names(path: Path, content: bytes) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(content, str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [f"{base}.{alias.name}" if node.module else base + alias.name for alias in node.names]
    return tuple(names)


def _imported_names(path: Path) -> tuple[str, ...]:
    """What the file imports: "harness.engine.method.Method", ".sibling.name", "torch"."""
    return _tree_names(path, path.read_bytes())


def _absolute(wanted: str, package: str) -> str:
    level = len(wanted) - len(wanted.lstrip("."))
    if level == 0:
        return wanted
    parents = package.split(".")[: package.count(".") + 2 - level]
    return ".".join([*parents, wanted[level:]])


def _find(module: str, tops: Mapping[str, Path]) -> Path | None:
    folder = tops.get(_top(module)) or _not_installed(_top(module), tuple(sys.path))
    if folder is None:
        return None
    place = folder.joinpath(*module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


@cache
def _not_installed(top: str, _path: tuple[str, ...]) -> Path | None:
    """The folder of a module or package that is a user's own; None for what Python or an installer brought."""
    try:
        spec = None if top in sys.stdlib_module_names else find_spec(top)
    except (ImportError, ValueError):  # no module, or one that was put into `sys.modules` by hand
        return None
    places = [] if spec is None else [*(spec.submodule_search_locations or [spec.origin or ""])]
    folders = [Path(place).resolve().parent for place in places if place and Path(place).exists()]
    return next((folder for folder in folders if not _INSTALLED & {*folder.parts}), None)


def _file_hash(path: Path) -> str:
    # A checkout may have turned line ends around.
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
