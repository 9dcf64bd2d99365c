"""The options of a method or task in words: `harness methods NAME`, `harness tasks NAME`."""

from __future__ import annotations

from typing import Any, NamedTuple

from harness.options import OptionSet


class OptionHelp(NamedTuple):
    """One option, in words: its name, the values it can take, its default, and what it means."""

    name: str
    values: str
    default: str
    meaning: str


def describe(options: type[OptionSet]) -> list[OptionHelp]:
    """Every option, in the order of the class."""
    schema = options.model_json_schema()["properties"] if options.model_fields else {}
    return [
        OptionHelp(
            name,
            _values(schema[name]),
            "required" if field.is_required() else _written(field.default),
            field.description or "",
        )
        for name, field in options.model_fields.items()
    ]


def _values(schema: dict[str, Any]) -> str:
    """What a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if schema.get("type") == "array":
        return f"{_values(schema['items'])}, joined by /"
    words = {"boolean": "true, false", "string": "text"}.get(schema["type"], schema["type"])
    return f"{schema.get('format', words)}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" {low} to {high}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {schema[key]}" for key, sign in signs.items() if key in schema)


def _written(default: Any) -> str:
    """As the user would write it."""
    if default is None:
        return "by itself"
    if isinstance(default, bool):
        return str(default).lower()
    return "/".join(map(str, default)) if isinstance(default, tuple) else str(default)
