"""Names -> classes, for methods and tasks alike.

A class joins by existing: every module of the package, in whatever folder, is searched for subclasses that name
themselves, then the entry points of installed packages, then single files the user points at. Nothing is listed by
hand.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from harness.errors import InputError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """All classes of one kind, found on first use."""

    def __init__(self, kind: str, package: str, base: type[T], group: str = "") -> None:
        """
        Args:
            kind: what one entry is, in words ("method").
            package: import package that is searched.
            base: the class every entry derives from.
            group: entry point group of installed packages; "" for `harness.<package>`.
        """
        self.kind, self.package, self.base, self.group = kind, package, base, group or f"harness.{package}"
        self._classes: dict[str, type[T]] = {}
        self._loaded: dict[str, Path] = {}
        self._searched = False

    def names(self) -> list[str]:
        """Every name, sorted."""
        self._search()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            InputError: nothing has that name; the nearest one is suggested.
        """
        self._search()
        if name not in self._classes:
            raise unknown(self.kind, name, self._classes)
        return self._classes[name]

    @property
    def files(self) -> list[Path]:
        """Files whose classes are here; another process that loads them knows the same names."""
        modules = dict.fromkeys(kind.__module__ for kind in self._classes.values())
        return [self._loaded[module] for module in modules if module in self._loaded]

    def load_file(self, path: Path) -> list[str]:
        """Adds the classes that a Python file defines and returns their names.

        A file that is loaded again replaces what it defined before.

        Raises:
            InputError: the file is missing, fails to import, defines none, misspells a hook, or takes a name that
                another class has.
        """
        self._search()
        if not path.is_file():
            raise InputError(f"{self.kind} file {path} does not exist")
        module = _import_file(path)
        found = self._add_from(module)
        if not found:
            raise InputError(f"{path} defines no {self.kind}: no named subclass of {self.base.__name__}")
        self._loaded[module.__name__] = path
        return found

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            if not module.ispkg:
                self._add_from(importlib.import_module(module.name))
        for point in entry_points(group=self.group):
            self._add(self._from_entry_point(point))

    def _from_entry_point(self, point: EntryPoint) -> type[T]:
        package = point.dist.name if point.dist else "an installed package"
        try:
            value = point.load()
        except Exception as error:
            raise InputError(f"{self.kind} {point.name!r} of {package} failed to import: {error}") from error
        if not (isinstance(value, type) and issubclass(value, self.base) and vars(value).get("name")):
            raise InputError(f"{point.value} of {package} is no named subclass of {self.base.__name__}")
        return value

    def _add_from(self, module: ModuleType) -> list[str]:
        own = [
            value
            for _, value in inspect.getmembers(module, inspect.isclass)
            if issubclass(value, self.base) and value.__module__ == module.__name__ and vars(value).get("name")
        ]
        for value in own:
            self._add(value)
        return [vars(value)["name"] for value in own]

    def _add(self, value: type[T]) -> None:
        _refuse_misspelt(value, self.base)
        name: str = vars(value)["name"]
        known = self._classes.get(name)
        if known is not None and _place(known) != _place(value):
            raise InputError(f"two {self.kind}s are named {name!r}: {_place(known)} and {_place(value)}")
        self._classes[name] = value


def _refuse_misspelt(kind: type, base: type) -> None:
    """Raises `InputError` for a public method that nobody would call, since its name nearly is one of the base's."""
    hooks = _public_callables(base)
    for name in sorted(_public_callables(kind) - set(dir(base))):
        near = difflib.get_close_matches(name, hooks, n=1, cutoff=0.75)
        if near:
            raise InputError(
                f"{kind.__qualname__}.{name} overrides nothing of {base.__name__}; did you mean {near[0]!r}? "
                f"(a helper of your own may be named _{name})"
            )


def _public_callables(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))}


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _import_file(path: Path) -> ModuleType:
    # Two folders may hold files of one name, so the name alone does not say which file it is.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"harness_plugin_{path.stem}_{place}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # annotations written as strings are looked up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} failed to import: {type(error).__name__}: {error}") from error
    return module
