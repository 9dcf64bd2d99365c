"""The file of `harness run --config`: YAML, the command's long options as keys.

model: smollm2
methods: [full, slim:block=32]    # or a text, as on the command line
tasks: needle
max-length: 4096
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.runner.spec import RunSpec, WrongOption
from harness.yaml_file import Node, read_yaml, wrong

Value = str | list[str]


def read_config(path: Path, options: Mapping[str, str]) -> dict[str, Value]:
    """What the file says of the options.

    Args:
        path: of the file.
        options: name in the file -> name of the parameter; underscores may stand for hyphens.

    Raises:
        InputError: no such file, an unknown or repeated option, or a value that does not fit; with the line.
    """
    known = dict(options) | {name.replace("-", "_"): parameter for name, parameter in options.items()}
    found: dict[str, Value] = {}
    for name, node in read_yaml(path).mapping("the file", known).items():
        if known[name] in found:
            raise wrong(path, node.line, f"{name!r} is given twice")
        found[known[name]] = _value(known[name], node)
    return found


def _value(parameter: str, node: Node) -> Value:
    if parameter in ("method_file", "task_file"):
        return [item.text() for item in node.items(parameter)]
    if parameter in ("methods", "tasks"):
        return ",".join(item.text() for item in node.items(parameter))
    _check(parameter, node)
    return node.text()


def _check(parameter: str, node: Node) -> None:
    """Whether a run can have the value, while the line is known."""
    if parameter not in RunSpec.model_fields:
        return
    try:
        RunSpec.read({parameter: node.text()})
    except WrongOption as error:
        raise wrong(node.path, node.line, f"{parameter}: {error.reason}") from None
