"""Tools that a model may call, and its calls, in the forms that data has them, as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class NotACallError(ValueError):
    """A value is no tool call, or no tool.

    Args:
        index: Which of the list.
        found: What is there.
    """

    def __init__(self, index: int, found: Any) -> None:
        super().__init__(f"[{index}]")
        self.index, self.found = index, found


def parsed(value: Any) -> Any:
    """JSON text as what it says; anything else as it is.

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


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls, their arguments as an object.

    Args:
        value: A list of calls or one call, or JSON text of either. A call is ``{"function": {"name", "arguments"}}``
            or the inner part alone; its arguments may be JSON text, and be called `parameters`.

    Raises:
        NotACallError: If one of them isn't a call.

    Example:
        >>> read_calls('{"name": "weather", "arguments": {"city": "Oslo"}}')
        [{'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Oslo'}}}]
    """
    value = parsed(value)
    if value is None or value in ("", []):
        return []
    found = []
    for i, call in enumerate(value if isinstance(value, list) else [value]):
        outer = parsed(call)
        inner = outer.get("function", outer) if isinstance(outer, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise NotACallError(i, call)
        arguments = parsed(inner.get("arguments", inner.get("parameters")))
        arguments = {} if arguments is None or arguments == "" else arguments
        if not isinstance(arguments, Mapping):
            raise NotACallError(i, call)
        kept = {key: outer[key] for key in ("id", "type") if isinstance(outer.get(key), str)}
        found.append({"type": "function", **kept, "function": {"name": inner["name"], "arguments": dict(arguments)}})
    return found


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Tools as JSON schemas, each in the form ``{"type": "function", "function": {...}}``.

    Args:
        value: A list of schemas or one schema, or JSON text of either; a function without its wrapping is wrapped.

    Raises:
        NotACallError: If one of them isn't a schema.

    Example:
        >>> read_tools([{"name": "weather", "parameters": {}}])
        [{'type': 'function', 'function': {'name': 'weather', 'parameters': {}}}]
    """
    value = parsed(value)
    if value is None or value in ("", [], {}):
        return []
    tools = []
    for i, given in enumerate(value if isinstance(value, list) else [value]):
        tool = parsed(given)
        if not isinstance(tool, Mapping) or not tool:
            raise NotACallError(i, given)
        if "name" in tool and "function" not in tool:
            function = {key: item for key, item in tool.items() if key != "type" or item != "function"}
            tool = {"type": "function", "function": function}
        tools.append(dict(tool))
    return tools
