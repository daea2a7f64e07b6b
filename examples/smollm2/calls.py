"""Function calls as texts, and whether one agrees with the values that are allowed for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Allowed = Mapping[str, Sequence[Any]]
"""Allowed values of each argument; an empty string among them means that the argument may be left out."""


def parse(text: str) -> dict[str, Any] | None:
    """Parse the call in an answer; `None` unless there is exactly one JSON object with a name and arguments.

    Words and code fences around the object are ignored.

    Example:
        >>> parse('Here it is: {"name": "ride", "arguments": {"minutes": 10}}')
        {'name': 'ride', 'arguments': {'minutes': 10}}
        >>> parse('{"name": "ride"}'), parse("ride(10)"), parse('{"name": "a", "arguments": {}}, {"name": "b"}')
        (None, None, None)
    """
    start = text.find("{")
    try:
        call, end = json.JSONDecoder().raw_decode(text, max(start, 0))
    except (ValueError, RecursionError):  # not JSON, a number that is too long, or too many brackets
        return None
    if "{" in text[end:] or not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return None
    return call if isinstance(call["name"], str) and isinstance(call["arguments"], dict) else None


def compact(value: object) -> str:
    """JSON without spaces between its parts.

    Example:
        >>> compact({"name": "ride", "arguments": {"to": "Café", "minutes": 10}})
        '{"name":"ride","arguments":{"to":"Café","minutes":10}}'
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def first_values(allowed: Allowed, required: Sequence[str] = ()) -> dict[str, Any]:
    """The first allowed value of each argument, without the arguments that may be left out.

    Args:
        allowed: Allowed values of each argument.
        required: Arguments that may not be left out.

    Example:
        >>> first_values({"to": ["Paris", "paris"], "class": ["", "economy"], "who": [{"name": ["Ada"], "age": [""]}]})
        {'to': 'Paris', 'who': {'name': 'Ada'}}
    """
    kept = {name: values for name, values in allowed.items() if name in required or "" not in values}
    return {name: _plain(next((value for value in values if value != ""), "")) for name, values in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return first_values(value) if all(isinstance(inner, list) for inner in value.values()) else value
    return [_plain(item) for item in value] if isinstance(value, list) else value


def agree(arguments: Mapping[str, Any], allowed: Allowed, required: Sequence[str] = ()) -> bool:
    """Whether a call has allowed values only, and all arguments that it must have.

    Args:
        arguments: Arguments of the call.
        allowed: Allowed values of each argument.
        required: Arguments that may not be left out.

    Example:
        >>> allowed = {"to": ["New York, NY"], "hours": [2.0], "class": ["", "economy"]}
        >>> agree({"to": "new york NY", "hours": 2}, allowed), agree({"to": "New York, NY"}, allowed)
        (True, False)
        >>> agree({"to": "New York, NY", "hours": 2.0, "class": "first"}, allowed)
        False
    """
    missing = [
        name for name, values in allowed.items() if name not in arguments and (name in required or "" not in values)
    ]
    return not missing and all(
        name in allowed and is_allowed(value, allowed[name]) for name, value in arguments.items()
    )


def is_allowed(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value is among the allowed ones.

    Strings are compared without case, spaces and some punctuation, and an integer may be given for a float, but not a
    float for an integer.

    Example:
        >>> is_allowed("April 1, 2024", ["april 1 2024"]), is_allowed(2, [2.0]), is_allowed(2.0, [2])
        (True, True, False)
        >>> is_allowed([{"x": 1}], [[{"x": [1, 2], "y": ["", 3]}]]), is_allowed(True, [1])
        (True, False)
    """
    return any(_is_same(value, right) for right in values)


def _is_same(value: Any, right: Any) -> bool:
    if isinstance(right, dict):
        if not isinstance(value, dict):
            return False
        # A dictionary holds allowed values for each of its keys, but plain values inside another dictionary.
        lists = all(isinstance(inner, list) for inner in right.values())
        return agree(value, right if lists else {key: [inner] for key, inner in right.items()})
    if isinstance(right, list):
        return isinstance(value, list) and len(value) == len(right) and all(map(_is_same, value, right))
    if isinstance(right, str):
        return isinstance(value, str) and standardized(value) == standardized(right)
    if isinstance(right, float) and type(value) is int:
        return value == right
    return type(value) is type(right) and value == right


def standardized(text: str) -> str:
    """A string without what is not compared.

    Example:
        >>> standardized("San Francisco, CA") == standardized("san-francisco ca")
        True
    """
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
