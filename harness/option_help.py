"""The options of a method or task in words: `harness methods NAME`, `harness tasks NAME`."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo

from harness.options import OptionSet


class OptionHelp(NamedTuple):
    """One option, in words: its name, the values it can take, its default, and what it means."""

    name: str
    values: str
    default: str
    meaning: str


def describe(options: type[OptionSet]) -> list[OptionHelp]:
    """Every option, in the order of the class."""
    return [_describe(name, field) for name, field in options.model_fields.items()]


def _describe(name: str, field: FieldInfo) -> OptionHelp:
    default = "required" if field.is_required() else written(field.get_default(call_default_factory=True))
    try:
        schema = TypeAdapter(field.rebuild_annotation()).json_schema()
    except PydanticInvalidForJsonSchema:
        schema = {}
    return OptionHelp(name, _values(schema, schema.get("$defs", {})), default, field.description or "")


def _values(schema: dict[str, Any], kinds: dict[str, Any]) -> str:
    """What a JSON schema allows; `kinds` are the schemas that it names."""
    if "$ref" in schema:
        return _values(kinds[schema["$ref"].rpartition("/")[2]], kinds)
    if "anyOf" in schema:
        return " or ".join(_values(one, kinds) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if "prefixItems" in schema:
        return " / ".join(_values(one, kinds) for one in schema["prefixItems"])
    if schema.get("type") == "array":
        return f"{_values(schema['items'], kinds)}, joined by /"
    kind = schema.get("type", "")
    words = {"boolean": "true, false", "string": "text"}.get(kind, kind)
    return f"{schema.get('format', words)}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" {low} to {high}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {schema[key]}" for key, sign in signs.items() if key in schema)


def written(default: Any) -> str:
    """As the user would write it."""
    if default is None:
        return "by itself"
    if isinstance(default, bool):
        return str(default).lower()
    return "/".join(map(str, default)) if isinstance(default, tuple) else str(default)
