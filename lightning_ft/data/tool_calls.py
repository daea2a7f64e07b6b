"""Read tools and tool calls, in the forms found in data, into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class ToolCallError(ValueError):
    """A value isn't a tool call, or isn't a tool.

    Args:
        index: Index of the value in its list.
        value: The value.
    """

    def __init__(self, index: int, value: object) -> None:
        super().__init__(f"[{index}]")
        self.index, self.value = index, value


def parsed(value: object) -> Any:
    """The value of JSON text; anything else unchanged.

    Example:
        >>> parsed('[{"name": "weather"}]'), parsed("weather")
        ([{'name': 'weather'}], 'weather')
    """
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def read_calls(value: object) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object.

    Args:
        value: A list of calls or one call, or JSON text of either. A call is ``{"function": {"name", "arguments"}}``
            or the inner part alone; its arguments may be JSON text, and may be named `parameters`.

    Raises:
        ToolCallError: If one of them isn't a call.

    Example:
        >>> read_calls('{"name": "weather", "arguments": {"city": "Oslo"}}')
        [{'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Oslo'}}}]
    """
    value = parsed(value)
    if value is None or value in ("", []):
        return []
    calls = []
    for i, call in enumerate(value if isinstance(value, list) else [value]):
        outer = parsed(call)
        inner = outer.get("function", outer) if isinstance(outer, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise ToolCallError(i, call)
        arguments = parsed(inner.get("arguments", inner.get("parameters")))
        arguments = {} if arguments is None or arguments == "" else arguments
        if not isinstance(arguments, Mapping):
            raise ToolCallError(i, call)
        kept = {key: outer[key] for key in ("id", "type") if isinstance(outer.get(key), str)}
        calls.append({"type": "function", **kept, "function": {"name": inner["name"], "arguments": dict(arguments)}})
    return calls


def read_tools(value: object) -> list[dict[str, object]]:
    """Tools as JSON schemas, each in the form ``{"type": "function", "function": {...}}``.

    Args:
        value: A list of schemas or one schema, or JSON text of either; a bare function is wrapped.

    Raises:
        ToolCallError: If one of them isn't a schema.

    Example:
        >>> read_tools([{"name": "weather", "parameters": {}}])
        [{'type': 'function', 'function': {'name': 'weather', 'parameters': {}}}]
    """
    value = parsed(value)
    if value is None or value in ("", [], {}):
        return []
    tools = []
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        tool = parsed(item)
        if not isinstance(tool, Mapping) or not tool:
            raise ToolCallError(i, item)
        if "name" in tool and "function" not in tool:
            function = {key: part for key, part in tool.items() if key != "type" or part != "function"}
            tool = {"type": "function", "function": function}
        tools.append(dict(tool))
    return tools
