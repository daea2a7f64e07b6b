"""JSON schemas of function calls, from descriptions of functions as the data have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {
    "dict": "object",
    "object": "object",
    "array": "array",
    "tuple": "array",
    "string": "string",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "boolean": "boolean",
}
"""Types of JSON schemas by the names that the data use; other names, such as ``any``, restrict nothing."""


def call_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of a call of one of several functions, as servers build it for strict tool calls.

    Args:
        functions: Descriptions, each with a `name` and `parameters`.

    Example:
        >>> ride = {"name": "ride", "parameters": {"type": "dict", "properties": {"to": {"type": "string"}}}}
        >>> call_schema([ride])["properties"]["name"]
        {'const': 'ride'}
    """
    calls = [
        _object({"name": {"const": function["name"]}, "arguments": value_schema(function["parameters"])})
        for function in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def value_schema(described: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a value: type, properties, items and allowed values, without descriptions and defaults.

    Args:
        described: Description of a parameter.

    Example:
        >>> value_schema({"type": "float", "description": "Distance.", "default": 1.0})
        {'type': 'number'}
        >>> value_schema({"type": "string", "enum": ["a", "b"]})
        {'enum': ['a', 'b']}
    """
    kind = TYPES.get(str(described.get("type")))
    if allowed := described.get("enum"):
        values = {"enum": list(allowed)}
        lists = kind != "array" or any(isinstance(value, list) for value in allowed)
        return values if lists else {"type": "array", "items": values}
    if kind == "object" and "properties" in described:
        properties = {name: value_schema(value) for name, value in described["properties"].items()}
        return _object(properties, described.get("required", []))
    if kind == "array" and isinstance(described.get("items"), Mapping):
        return {"type": "array", "items": value_schema(described["items"])}
    return {} if kind is None else {"type": kind}


def _object(properties: Mapping[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    needed = [name for name in (properties if required is None else required) if name in properties]
    return {
        "type": "object",
        "properties": dict(properties),
        "required": needed,
        "additionalProperties": False,
    }
