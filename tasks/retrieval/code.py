"""Code completion over Python's own standard library: the next line of a function that was shown before.

The text is real source code, module after module. One whole function stands at the depth; at the end it begins once
more, and its next line is asked for. A model that still has the first copy only has to go on copying. The text depends
on the Python version, which the record names.
"""

from __future__ import annotations

import ast
import platform
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

from harness.errors import InputError
from tasks.base import Sample, Tokenizer
from tasks.common.haystack import Draft, Span, filler_ids
from tasks.longbench.scores import code_sim
from tasks.retrieval.suite import DeepSuite, Seeds

# Written in Python and there in every version that the project supports.
MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "difflib", "dis", "doctest", "enum", "filecmp", "fileinput", "fractions", "ftplib", "functools", "getopt",
    "gettext", "glob", "gzip", "heapq", "imaplib", "inspect", "ipaddress", "locale", "mailbox", "mimetypes", "netrc",
    "optparse", "pdb", "pickle", "pickletools", "pkgutil", "platform", "plistlib", "poplib", "posixpath", "pprint",
    "profile", "pstats", "queue", "random", "sched", "selectors", "shelve", "shlex", "shutil", "smtplib",
    "socketserver", "ssl", "statistics", "string", "subprocess", "tabnanny", "tarfile", "tempfile", "textwrap",
    "threading", "timeit", "trace", "traceback", "uuid", "weakref",
)  # fmt: skip

LONGEST_FUNCTION = 600
"""Characters; it stands in the text nearly twice."""

_UNSCORED = ("`", "#", "//")
"""Signs of lines that code similarity skips."""


@dataclass(frozen=True)
class Function:
    """A function and those of its lines that may be asked for.

    Attributes:
        module: where it comes from.
        name: its name.
        lines: its source, indentation of a method removed.
        askable: numbers of lines that begin a statement, have an identifiable text and something before them.
    """

    module: str
    name: str
    lines: tuple[str, ...]
    askable: tuple[int, ...]


class CodeCompletion(DeepSuite):
    """The next line of a function of the standard library that stood earlier in the text."""

    member: ClassVar[str] = "code-completion"
    summary: ClassVar[str] = "the next line of a standard-library function shown before; LongBench's code similarity"
    metric = "code_sim"

    def fingerprint(self) -> str:
        """Nothing: the code is Python's own."""
        return ""

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """Code with the function at the depth; the asked line and the one before it are what an answer needs."""
        start = seeds.text % len(MODULES)
        function, asked = _choose(start, seeds.rng())
        once = "\n".join(function.lines)
        ending = "\n\n\n" + "\n".join(function.lines[:asked]) + "\n"
        fixed = len(tokenizer.encode(f"\n\n\n{once}{ending}"))
        ids = filler_ids(tokenizer, sources(), target - fixed, start, "\n\n\n")
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # In tokens: code differs much in characters a token.
        before, after = _part(text, len(tokenizer.decode(ids[: int(depth * len(ids))], skip_special_tokens=True)))
        places = [_place(function.lines, asked, len(before))]
        facts = {"module": function.module, "function": function.name, "python": platform.python_version()}
        return Draft(before + once + after + ending, ending, (function.lines[asked],), places, facts)

    def answer_tokens(self) -> int:
        """A line."""
        return 48

    def score(self, sample: Sample, prediction: str) -> float:
        """LongBench's `code_sim` of the first line that is no comment, on difflib."""
        return max(code_sim(prediction, answer) for answer in sample.answers)


@cache
def source(module: str) -> str:
    """Source of a module of the standard library.

    Raises:
        InputError: this Python comes without it.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    path = library / f"{module}.py"
    try:
        # Some modules become packages in later versions of Python.
        return (path if path.is_file() else library / module / "__init__.py").read_text(encoding="utf-8").strip()
    except OSError:
        raise InputError(f"code-completion reads Python's own library, which lacks the source of {module}") from None


@cache
def sources() -> tuple[str, ...]:
    """Source of all modules; raises as `source`."""
    return tuple(map(source, MODULES))


@cache
def functions(module: str) -> tuple[Function, ...]:
    """Its functions and methods of six lines or more, short enough for the shortest prompts, with a line to ask for."""
    text = source(module)
    found = (_function(module, text, node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    return tuple(function for function in found if function.askable)


def _function(module: str, text: str, node: ast.FunctionDef) -> Function:
    raw = text.split("\n")[node.lineno - 1 : node.end_lineno]
    once = dedent("\n".join(raw))
    lines = tuple(once.split("\n"))
    starts = sorted({statement.lineno - node.lineno for statement in _statements(node)})
    # dedent gives up where a text inside the function starts at the margin.
    fits = len(lines) >= 6 and len(once) <= LONGEST_FUNCTION and once.startswith("def ")
    return Function(module, node.name, lines, tuple(n for n in starts if fits and n >= 3 and _is_askable(lines, n)))


def _statements(node: ast.FunctionDef) -> Iterator[ast.stmt]:
    """All statements but the docstring and other bare constants."""
    for child in ast.walk(node):
        bare = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if isinstance(child, ast.stmt) and not bare and child is not node:
            yield child


def _is_askable(lines: Sequence[str], number: int) -> bool:
    line, before = lines[number].strip(), lines[number - 1].strip()
    plain = len(line) >= 16 and len(before) >= 4 and not any(sign in line for sign in _UNSCORED)
    return plain and "\n".join(lines).count(line) == 1


def _choose(start: int, rng: random.Random) -> tuple[Function, int]:
    """A function and the number of a line of it, from a module that text beginning at module `start` reaches last."""
    while True:
        if found := functions(MODULES[start - rng.randint(1, 10)]):
            function = rng.choice(found)
            return function, rng.choice(function.askable)


def _place(lines: Sequence[str], asked: int, offset: int) -> Span:
    """Characters of the asked line and the one before it, without the indentation."""
    start, pair = len("\n".join(lines[: asked - 1])) + 1, "\n".join(lines[asked - 1 : asked + 1])
    return offset + start + len(pair) - len(pair.lstrip()), offset + start + len(pair)


def _part(text: str, wanted: int) -> tuple[str, str]:
    """The text before and after the blank line nearest to character `wanted`, blank lines included.

    Where the nearest is more than 3 % of the text away (in long tables), the nearest end of a line will do.
    """
    places = [_nearest(text, gap, wanted) for gap in ("\n\n", "\n")]
    place = next((place for place in places if abs(place - wanted) <= 0.03 * len(text)), wanted)
    before = text[:place].rstrip("\n")
    return before + "\n\n\n" if before else "", "\n\n\n" + text[place:].lstrip("\n")


def _nearest(text: str, gap: str, wanted: int) -> int:
    """Where the gap nearest to a character is; the text's start and end count as gaps."""
    ends = (max(text.rfind(gap, 0, wanted), 0), text.find(gap, wanted) % (len(text) + 1))
    return min(ends, key=lambda end: abs(end - wanted))
