"""Read tools and tool calls, in the forms found in data, into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from lightning_ft.errors import ConfigError


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
        tools.append({**tool, "function": _schema(tool["function"])} if "function" in tool else dict(tool))
    return tools


def _schema(function: Any) -> Any:
    """A function without the properties that are None, which is no schema: Arrow gives all tools each other's names."""
    properties = _properties(function)
    if properties is None:
        return function
    named = {name: schema for name, schema in properties.items() if schema is not None}
    return {**function, "parameters": {**function["parameters"], "properties": named}}


def _properties(function: Any) -> Mapping[str, Any] | None:
    """Schemas of a function's arguments by name; None where there are none in that form."""
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else None


def known_arguments(
    calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], set[str]]:
    """Calls without arguments that are None and not in the schema of their function.

    Arrow gives the arguments of all calls the same names, with None for those that a call doesn't have.

    Args:
        calls: Calls as `read_calls` returns them.
        tools: Tools as `read_tools` returns them; the arguments of a function that isn't among them are kept.

    Returns:
        The calls, and the names of what was left out.

    Example:
        >>> tools = read_tools({"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}})
        >>> calls = read_calls({"name": "weather", "arguments": {"city": "Oslo", "n": None}})
        >>> calls, names = known_arguments(calls, tools)
        >>> calls[0]["function"]["arguments"], names
        ({'city': 'Oslo'}, {'n'})
    """
    functions = [function for tool in tools if isinstance(function := tool.get("function"), Mapping)]
    schemas = {str(function.get("name")): _properties(function) for function in functions}
    known, left_out = [], set[str]()
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        properties = schemas.get(name)
        unknown = {
            argument
            for argument, value in arguments.items()
            if properties is not None and value is None and argument not in properties
        }
        kept = {argument: value for argument, value in arguments.items() if argument not in unknown}
        known.append({**call, "function": {"name": name, "arguments": kept}})
        left_out |= unknown
    return known, left_out


def template_variables(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of the chat template for all rows, with `tools`, which may be functions, in the form of templates.

    Raises:
        ConfigError: If one of the tools isn't a schema.
    """
    variables = dict(kwargs or {})
    if "tools" in variables:
        tools = variables["tools"]
        if isinstance(tools, Sequence) and not isinstance(tools, str):  # as a tuple, or a list of functions
            tools = [get_json_schema(tool) if isinstance(tool, FunctionType) else tool for tool in tools]
        try:
            variables["tools"] = read_tools(tools)
        except ToolCallError as error:
            raise ConfigError(
                f"chat_template_kwargs: tools[{error.index}] isn't a tool: {error.value!r:.60}. Expected a list of "
                "JSON schemas, or JSON text of one."
            ) from None
    return variables
