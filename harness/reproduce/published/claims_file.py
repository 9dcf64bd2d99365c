"""Reads the file of published claims."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from harness.reproduce.claims import Claim
from harness.yaml_file import Node, read_yaml, wrong

MEASURES = {"ttft": "x", "tpot": "x", "e2e": "x", "kv": "x", "peak": "x", "score": "points", "none": "x"}
"""What a claim may be about -> unit."""
_PAPER = ("method", "paper", "source", "where", "setting", "model", "window", "not_here", "claims")
_CLAIM = ("what", "measure", "figure", "model", "length", "batch", "options", "upto", "against", "tasks", "not_here")
_LISTS = ("tasks", "options")
_COUNTS = ("length", "window", "batch")
SPEED = ("speed",)


@dataclass(frozen=True)
class Published:
    """One published figure; attributes as in the file.

    Attributes:
        claim: name, figure and unit.
    """

    claim: Claim
    method: str
    paper: str
    source: str
    where: str
    setting: str
    what: str
    measure: str
    model: str = ""
    length: int | None = None
    window: int | None = None
    batch: int = 1
    options: tuple[str, ...] = ()
    upto: bool = False
    against: str = "full"
    tasks: tuple[str, ...] = SPEED
    not_here: str = ""


@cache
def published() -> tuple[Published, ...]:
    """Every claim of the package's file."""
    with as_file(files("harness.reproduce.published") / "claims.yaml") as path:
        return read_claims(path)


def read_claims(path: Path) -> tuple[Published, ...]:
    """Every claim of a file, in its order.

    Raises:
        InputError: no such file, no YAML, or an entry that does not fit; with the line.
    """
    return tuple(claim for paper in read_yaml(path).items("papers") for claim in _of_paper(paper))


def _of_paper(node: Node) -> list[Published]:
    keys = _keys(node, "the paper", _PAPER, required=("method", "paper", "source", "where", "setting", "claims"))
    return [_claim(one, keys) for one in keys["claims"].items("claims")]


def _claim(node: Node, paper: dict[str, Node]) -> Published:
    keys = _keys(node, "the claim", _CLAIM, required=("what", "measure", "figure"))
    text = {key: part.text() for key, part in (paper | keys).items() if key not in ("claims", *_LISTS)}
    unit = MEASURES.get(text["measure"])
    if unit is None:
        raise wrong(node.path, keys["measure"].line, f"measure {text['measure']!r}: expected {', '.join(MEASURES)}")
    name = f"{text['method']}: {text['what']}, {text['measure']}"
    lists = {key: tuple(entry.text for entry in keys[key].entries(key)) for key in _LISTS if key in keys}
    counts = {key: int(_number(part)) for key, part in (paper | keys).items() if key in _COUNTS}
    return Published(
        claim=Claim(name, _number(keys["figure"]), unit),
        **{key: text[key] for key in ("method", "paper", "source", "where", "setting", "what", "measure")},
        model=text.get("model", ""),
        length=counts.get("length"),
        window=counts.get("window"),
        batch=counts.get("batch", 1),
        options=lists.get("options", ()),
        upto=text.get("upto") == "true",
        against=text.get("against", "full"),
        tasks=lists.get("tasks", SPEED),
        not_here=text.get("not_here", ""),
    )


def _keys(node: Node, what: str, known: tuple[str, ...], required: tuple[str, ...]) -> dict[str, Node]:
    keys = node.mapping(what, known)
    for key in required:
        if key not in keys:
            raise wrong(node.path, node.line, f"{what} has no {key!r}")
    return keys


def _number(node: Node) -> float:
    try:
        return float(node.text())
    except ValueError:
        raise wrong(node.path, node.line, f"expected a number, not {node.text()!r}") from None
